"""Are the probes right? Closed forms, planted models, error rates, corruptions."""

"""Are the probes right? Closed forms, planted models, nulls, corruptions."""

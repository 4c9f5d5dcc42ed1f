"""An OpenAI-compatible endpoint on this machine (the [serve] extra)."""

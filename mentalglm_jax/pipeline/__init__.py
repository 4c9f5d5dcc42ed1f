"""The main job, resumable stage by stage, and its run directory."""

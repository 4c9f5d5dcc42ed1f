"""The report page, figures for papers, what a notebook shows."""

"""What came out of a study, from its curves alone: comparison, fits, plots, pages (``vwn-study report``)."""

"""Does width pay: variants of a model times seeds, trained, resumed and compared (``vwn-study``)."""

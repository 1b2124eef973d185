"""What a virtual width costs, measured against the least it can cost (``vwn-benchmark``)."""

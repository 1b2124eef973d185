"""Memory, time and layouts of a run before it starts, by arithmetic (``vwn-plan``)."""

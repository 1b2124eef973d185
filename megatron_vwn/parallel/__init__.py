"""How the stream is split over tensor-parallel ranks and crosses pipeline stages."""

"""What a run will need, on hardware that one does not have."""

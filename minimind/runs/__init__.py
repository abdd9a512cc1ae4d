"""What runs have left in their folders: read back, told, compared and repeated."""

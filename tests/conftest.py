"""Being here puts tests/ on the import path: any test may import checkpoints.py."""

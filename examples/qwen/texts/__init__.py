"""What models are given to read: articles, calibration text, and the prompt for a summary. Knows no model."""

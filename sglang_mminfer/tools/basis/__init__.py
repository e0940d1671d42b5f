"""`mminfer basis`: a file with the low-rank forms of a model's heads, from calibration conversations."""

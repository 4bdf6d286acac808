"""Algorithm 1 and its data: x, e and s of each bucket, and the layout of the parameters in buckets."""

"""`nunchaku bench cache`: how near cached pictures are to uncached ones, at what speed, ours and others'."""

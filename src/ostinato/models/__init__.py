"""Model families, one file each: config, weight map, what it keeps, forward."""

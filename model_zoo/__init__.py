"""Model families that the toolkit knows, and small bundled models and data. Found by entry points; never imported by core."""

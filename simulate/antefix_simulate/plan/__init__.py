"""`antefix plan`: how many machines of which kind a trace needs, given measured speeds."""

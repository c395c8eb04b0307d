"""`antefix plan`: how much of everything a trace takes on machines whose speeds were measured."""

"""What workers and stores hold, told to routers: one numbered log, the ways it travels, one follower."""

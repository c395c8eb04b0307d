"""Events that tell routers what workers and stores hold: a numbered log, its transports, and a follower."""

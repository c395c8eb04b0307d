"""Where a request goes: the workers, what each of them holds and has to do, and the policy that chooses."""

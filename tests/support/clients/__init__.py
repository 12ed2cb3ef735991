"""Clients that users have, in an environment of their own: their pins collide with ours."""

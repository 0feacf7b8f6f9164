"""Alembic's scripts. `env.py` runs them on the connection that `Database.migrate` hands over."""

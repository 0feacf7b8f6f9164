"""Durable records in SQL: files, jobs, events, checkpoints, stored chats, feedback, keys. SQLite (WAL) or PostgreSQL.

    database.py    engine, transactions, migration
    tables.py      one class a table
    pages.py       keyset pages, the way OpenAI's lists page
    files.py, jobs.py, chats.py   the queries, one class a subject

Knows nothing of HTTP, processes or adapters: the adapter store on disk is the truth for versions, these rows only
name them. Every row carries `owner`, the id of the API key that made it; queries take `owner=None` for an admin.
"""

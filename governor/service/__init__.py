"""The HTTP service: templates, guarded batches, one governor per pool for all batches, and what goes on, live.

api/        FastAPI: routes, bodies, who may do what, connections of clients, a batch on its way in, the page's files
worker/     this process as a replica: its lease, its batches, one lane per pool
store/      the database: one journal of many batches (`ledger`), and everything else that is kept
migrations/ Alembic's, for databases of earlier versions
static/     the page
"""

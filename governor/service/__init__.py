"""The HTTP service: templates, guarded batches, one governor per pool for all batches, and live state.

api/        FastAPI: routes, bodies, access rights, client connections, incoming batches, the page's files
worker/     this process as a replica: its lease, its batches, one lane per pool
store/      the database: one journal of many batches (`ledger`), and the service's other tables
migrations/ Alembic's, for databases of earlier versions
static/     the page
"""

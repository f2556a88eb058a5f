"""The HTTP service: templates, guarded batches, one law for all batches of a pool, and what goes on, live.

What lives here: everything behind `paceline serve`. What must not: any rule of pacing (the law), the sending
(`openai_adapter`), how attempts are recorded (`recorder`), a simulator (what simulates comes in as a callable).

    app, routes_*   FastAPI: paths, bodies (`bodies`), errors (`errors`), who may do what (`auth`, `guard`)
    accept          a batch on its way in: read as a stream, judged, durable, then accepted
    templates       prompts in sandboxed Jinja2
    worker, roster  this process as a replica: its lease, its lives; and the batches that it has claimed
    lane, feed      one pool: one governor for all batches, and whose line is next
    ledger          the database as one journal of many batches
    store, tables   everything else that is kept; migrations/ is Alembic's
    live, events    what goes on, as values and as server-sent events
"""

"""The HTTP interface: routes, bodies, authentication, events, the page."""

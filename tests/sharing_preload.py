"""What workers of `tests/sharing.py` find loaded: everything, and the half of the SDK that its first client fetches."""

from governor.provider.openai_adapter import Adapter
from tests import sharing

assert sharing.Order
Adapter(environment={"OPENAI_API_KEY": "nobody's"})

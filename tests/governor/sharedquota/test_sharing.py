"""What cannot be shared is refused before Redis is asked."""

from __future__ import annotations

import pytest

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from governor.model.pools import default_pools
from governor.sharedquota.sharing import governor_from_env


@pytest.mark.parametrize("find", ["tokens", "requests", "both"])
def test_a_limit_that_is_sought_is_not_shared(find: str) -> None:
    env = {"OPENAI_API_KEY": "sk-none", "OPENAI_FIND_LIMITS": find, "PACELINE_REDIS_URL": "redis://127.0.0.1:9/0"}
    (pool,) = default_pools(Policy.from_env(env), env)
    with pytest.raises(BadSetting, match=f"pool '{pool.name}': OPENAI_FIND_LIMITS={find} does not work") as caught:
        governor_from_env(env, pool)
    assert "PACELINE_REDIS_URL" in str(caught.value)

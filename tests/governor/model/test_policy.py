"""The policy's table of knobs, what it reads, what it refuses, and what it writes."""

from __future__ import annotations

import io
import math
import random
import re

import pytest
from dotenv import dotenv_values
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from governor import law
from governor.model.errors import BadSetting
from governor.model.knobs import Knob
from governor.model.policy import GUARDRAIL_KNOBS, KNOB_BY_ENV, KNOBS, Policy, knob_table, near_miss

# What was promised: env name, guardrails, paceline ("" = the planner's to fill in, so it stays as in guardrails).
PROMISED = """
OPENAI_MAX_CONCURRENCY 3 20
OPENAI_STAGGER_SECONDS 15 0.2
OPENAI_TPM_LIMIT 30000 30000
OPENAI_TPM_HEADROOM 0.15 0.15
OPENAI_EST_TOKENS_PER_RUN 7000 7000
OPENAI_RETRY_MAX_ATTEMPTS 5 8
OPENAI_BACKOFF_BASE_SECONDS 2 2
FINALIZE_LOWERS_CONCURRENCY true true
OPENAI_TPM_WINDOW fixed bucket
OPENAI_BURST_SECONDS 60 60
OPENAI_CHARGE_RULE fixed auto
OPENAI_SETTLE false false
OPENAI_LAUNCH_ORDER fifo longest_first
OPENAI_BACKOFF_KEEPS_PERMIT true false
OPENAI_HOLD_ON_THROTTLE false true
OPENAI_SYNC_HEADERS false true
OPENAI_REFUND_THROTTLED false false
OPENAI_INTERACTIVE_RESERVE 0 0
OPENAI_RPM_LIMIT 0 0
OPENAI_RPD_LIMIT 0 0
OPENAI_TPD_LIMIT 0 0
OPENAI_FIND_LIMITS none none
OPENAI_BATCH_QUEUE_TOKENS 0 0
OPENAI_JITTER_RATIO 0.2 0.2
OPENAI_JITTER_CAP_SECONDS 3 3
OPENAI_BACKOFF_CAP_SECONDS 60 60
OPENAI_RETRY_AFTER_CAP_SECONDS 600 600
OPENAI_REQUEST_TIMEOUT_SECONDS 600 600
OPENAI_DEADLINE_SECONDS 0 0
FINALIZE_MAX_CONCURRENCY 2 2
FINALIZE_MAX_TOKENS 6000 6000
PREFLIGHT_MODE paced paced
"""
ROWS = [line.split() for line in PROMISED.split("\n") if line]


def parse(text: str) -> dict[str, str | None]:
    return dotenv_values(stream=io.StringIO(text), interpolate=False)


def numbers(knob: Knob) -> st.SearchStrategy[bool | int | float | str]:
    """Any value that the knob allows, its ends included."""
    if knob.kind == "boolean":
        return st.booleans()
    if knob.kind == "string":
        return st.sampled_from(knob.choices)
    if knob.kind == "integer":
        return st.integers(int(knob.low), int(knob.high))
    return st.floats(knob.low, knob.high, exclude_min=knob.low_open, exclude_max=knob.high_open)


policies = st.fixed_dictionaries({}, optional={knob.name: numbers(knob) for knob in KNOBS}).map(
    lambda changes: Policy().with_(**changes)
)


class TestTable:
    def test_names_and_presets_are_those_of_the_design(self) -> None:
        assert [[k.env, k.text(k.guardrails), k.text(k.paceline)] for k in KNOBS] == ROWS
        assert [k.env for k in GUARDRAIL_KNOBS] == [row[0] for row in ROWS[:8]]

    def test_a_name_is_the_field_in_capitals(self) -> None:
        for knob in KNOBS:
            assert knob.env.removeprefix("OPENAI_").lower() == knob.name

    def test_presets_are_policies_of_the_table(self) -> None:
        guardrails, paceline = Policy.preset("guardrails"), Policy.preset("paceline")
        assert guardrails == Policy()
        for knob in KNOBS:
            assert getattr(guardrails, knob.name) == knob.guardrails
            assert getattr(paceline, knob.name) == knob.paceline
        with pytest.raises(BadSetting, match="no preset 'fast': guardrails or paceline"):
            Policy.preset("fast")

    def test_the_table_holds_every_knob_once(self) -> None:
        rows = knob_table().splitlines()
        assert len(rows) == 2 + len(KNOBS)
        assert {row.count("|") for row in rows} == {6}
        for knob in KNOBS:
            assert sum(row.startswith(f"| {knob.env} |") for row in rows) == 1

    def test_a_knob_goes_by_any_of_its_names_from_the_beginning(self) -> None:
        assert Policy(stagger_s=0) == Policy(stagger_seconds=0) == Policy(OPENAI_STAGGER_SECONDS=0)  # type: ignore[call-arg]
        with pytest.raises(BadSetting, match="OPENAI_STAGGER_SECONDS is given twice, once as stagger_s"):
            Policy(stagger_seconds=1, stagger_s=0)  # type: ignore[call-arg]
        with pytest.raises(BadSetting, match=r"there is no setting 'stager_s': did you mean stagger_s\?"):
            Policy(stager_s=0)  # type: ignore[call-arg]

    def test_what_is_allowed_reads_as_a_sentence(self) -> None:
        def allowed(env: str) -> str:
            return KNOB_BY_ENV[env].allowed

        assert allowed("OPENAI_MAX_CONCURRENCY") == "a whole number from 1 to 100,000 (requests)"
        assert allowed("OPENAI_TPM_HEADROOM") == "a number from 0 to below 1 (ratio)"
        assert allowed("OPENAI_BACKOFF_BASE_SECONDS") == "a number above 0, to 3,600 (s)"
        assert allowed("OPENAI_SETTLE") == "true or false"
        assert allowed("PREFLIGHT_MODE") == "one of strict, paced"


class TestReading:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            *(("true", True), ("TRUE", True), ("1", True), ("Yes", True), ("on", True)),
            *(("False", False), ("0", False), ("no", False), ("OFF", False)),
        ],
    )
    def test_switches(self, text: str, value: bool) -> None:
        assert Policy.from_env({"OPENAI_SETTLE": f" {text} "}).settle is value

    def test_numbers_with_blanks_and_choices_in_capitals(self) -> None:
        policy = Policy.from_env(
            {"OPENAI_STAGGER_SECONDS": " 2.5\t", "OPENAI_MAX_CONCURRENCY": "020", "OPENAI_TPM_WINDOW": "Bucket"}
        )
        assert (policy.stagger_seconds, policy.max_concurrency, policy.tpm_window) == (2.5, 20, "bucket")
        assert Policy.from_env({"OPENAI_BACKOFF_BASE_SECONDS": "1e-1"}).backoff_base_seconds == 0.1

    def test_an_empty_value_is_not_set(self) -> None:
        base = Policy.preset("paceline")
        policy = Policy.from_env({"OPENAI_TPM_WINDOW": "", "OPENAI_SETTLE": "  ", "OPENAI_TPM_LIMIT": None}, base)
        assert policy == base
        assert policy.model_fields_set == base.model_fields_set

    def test_named_fields_are_remembered_and_a_base_shows_through(self) -> None:
        policy = Policy.from_env({"OPENAI_TPM_LIMIT": "30000"}, Policy.preset("paceline"))
        assert "tpm_limit" in policy.model_fields_set
        assert "rpm_limit" not in policy.model_fields_set
        assert policy.tpm_window == "bucket"

    @pytest.mark.parametrize("knob", [k for k in KNOBS if k.kind in ("integer", "number")], ids=lambda k: k.env)
    def test_ranges_hold_to_their_ends(self, knob: Knob) -> None:
        step = 1 if knob.kind == "integer" else None
        below = knob.low - 1 if step else math.nextafter(knob.low, -math.inf)
        above = knob.high + 1 if step else math.nextafter(knob.high, math.inf)
        for value, is_allowed in (
            (knob.low, not knob.low_open),
            (knob.high, not knob.high_open),
            (below, False),
            (above, False),
        ):
            text = knob.text(int(value) if step else float(value))
            if is_allowed:
                assert getattr(Policy.from_env({knob.env: text}), knob.name) == value
            else:
                with pytest.raises(BadSetting) as caught:
                    Policy.from_env({knob.env: text})
                assert str(caught.value) == f"{knob.env}='{text}' is not allowed: {knob.allowed}"
                assert caught.value.name == knob.env

    @pytest.mark.parametrize("knob", KNOBS, ids=lambda k: k.env)
    @pytest.mark.parametrize(
        "text", ["nan", "inf", "-inf", "1e999", "ten", "1,000", "1_000", "٣", "0x10", "3 4", "9" * 5000]
    )
    def test_nonsense_is_one_line_with_name_value_and_what_is_allowed(self, knob: Knob, text: str) -> None:
        with pytest.raises(BadSetting) as caught:
            Policy.from_env({knob.env: text})
        message = str(caught.value)
        assert message.startswith(f"{knob.env}='{text[:57]}")
        assert message.endswith(knob.allowed)
        assert len(message) < 250

    def test_a_whole_number_has_no_fraction_and_control_characters_are_escaped(self) -> None:
        with pytest.raises(BadSetting, match=r"^OPENAI_TPM_LIMIT='2\.5' is not allowed: a whole number"):
            Policy.from_env({"OPENAI_TPM_LIMIT": "2.5"})
        with pytest.raises(BadSetting, match=r"^OPENAI_TPM_LIMIT='1\\n\\x1b2' is not allowed"):
            Policy.from_env({"OPENAI_TPM_LIMIT": "1\n\x1b2"})

    def test_python_values_are_checked_in_the_same_words(self) -> None:
        with pytest.raises(BadSetting, match=r"^OPENAI_TPM_HEADROOM='1' is not allowed: a number from 0 to below 1"):
            Policy(tpm_headroom=1.0)
        with pytest.raises(BadSetting, match=r"^OPENAI_MAX_CONCURRENCY='true' is not allowed"):
            Policy(max_concurrency=True)
        with pytest.raises(BadSetting, match=r"^OPENAI_TPM_WINDOW='rolling' is not allowed: one of fixed"):
            Policy().with_(tpm_window="rolling")
        with pytest.raises(BadSetting, match="no setting 'stager_seconds': did you mean stagger_seconds"):
            Policy().with_(stager_seconds=3)
        with pytest.raises(BadSetting, match="nan"):
            Policy(stagger_seconds=math.nan)

    def test_a_policy_does_not_change(self) -> None:
        policy = Policy()
        with pytest.raises(ValidationError, match="frozen"):
            policy.max_concurrency = 5
        assert policy.with_(max_concurrency=5).max_concurrency == 5
        assert policy.max_concurrency == 3


class TestSet:
    def test_the_last_of_equal_names_wins(self) -> None:
        policy = Policy().set_values(["OPENAI_TPM_LIMIT=1000", " OPENAI_TPM_LIMIT = 2000 "])
        assert policy.tpm_limit == 2000

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("OPENAI_STAGER_SECONDS=3", "no setting 'OPENAI_STAGER_SECONDS': did you mean OPENAI_STAGGER_SECONDS?"),
            ("STAGGER_SECONDS=3", "did you mean OPENAI_STAGGER_SECONDS?"),
            ("OPENAI_API_KEY=sk-secret", "there is no setting 'OPENAI_API_KEY'"),
            ("=3", "there is no setting ''"),
            ("OPENAI_TPM_LIMIT", "was given no value"),
            ("OPENAI_TPM_LIMIT= ", "was given no value"),
            ("OPENAI_TPM_LIMIT=0", "OPENAI_TPM_LIMIT='0' is not allowed"),
        ],
    )
    def test_every_name_must_be_ours(self, word: str, message: str) -> None:
        with pytest.raises(BadSetting) as caught:
            Policy().set_values([word])
        assert message in str(caught.value)
        assert "secret" not in str(caught.value)


# Names seen in public programs and SDKs, none of which means a knob of ours.
FOREIGN = """
OPENAI_API_KEY OPENAI_API_KEYS OPENAI_KEY OPENAI_TOKEN OPENAI_ADMIN_KEY OPENAI_API_BASE OPENAI_API_BASE_URL
OPENAI_BASE_URL OPENAI_BASE_PATH OPENAI_BASE OPENAI_HOST OPENAI_URL OPENAI_ENDPOINT OPENAI_API_TYPE OPENAI_API_VERSION
OPENAI_API_HOST OPENAI_ORG OPENAI_ORG_ID OPENAI_ORGANIZATION OPENAI_ORGANIZATION_ID OPENAI_PROJECT OPENAI_PROJECT_ID
OPENAI_USER_AGENT OPENAI_MODEL OPENAI_MODELS OPENAI_MODEL_NAME OPENAI_CHAT_MODEL OPENAI_DEFAULT_MODEL
OPENAI_EMBEDDING_MODEL OPENAI_MODE OPENAI_FINE_TUNE_MODEL OPENAI_IMAGE_MODEL OPENAI_LOG OPENAI_LOG_LEVEL OPENAI_DEBUG
OPENAI_PROXY OPENAI_WEBHOOK_SECRET OPENAI_TIMEOUT OPENAI_TIMEOUT_MS OPENAI_TIMEOUT_S OPENAI_TIMEOUT_SEC
OPENAI_TIMEOUT_SECONDS OPENAI_CONNECT_TIMEOUT OPENAI_READ_TIMEOUT OPENAI_HTTP_TIMEOUT OPENAI_REQUEST_TIMEOUT
OPENAI_REQUEST_TIMEOUT_MS OPENAI_IMAGE_REQUEST_TIMEOUT OPENAI_MAX_RETRIES OPENAI_MAX_RETRY OPENAI_RETRIES
OPENAI_RETRY_COUNT OPENAI_RETRY_DELAY_MS OPENAI_RETRY_ENABLED OPENAI_RETRY_BASE_SECONDS OPENAI_RETRY_AFTER_SECONDS
OPENAI_RETRY_MAX_TOKENS OPENAI_MAX_ATTEMPTS OPENAI_BACKOFF_SECONDS OPENAI_MAX_TOKENS OPENAI_MAX_OUTPUT_TOKENS
OPENAI_MAX_COMPLETION_TOKENS OPENAI_CHAT_MAX_COMPLETION_TOKENS OPENAI_MAX_INPUT_TOKENS OPENAI_MAX_CONTEXT
OPENAI_TEMPERATURE OPENAI_TOP_P OPENAI_SEED OPENAI_STOP OPENAI_STREAM OPENAI_RPM OPENAI_TPM OPENAI_RPD
OPENAI_RPM_PER_KEY OPENAI_TPM_GPT4O_MINI OPENAI_RATE_LIMIT OPENAI_RATE_LIMIT_RPS OPENAI_API_LIMIT OPENAI_IPM_LIMIT
OPENAI_RPS_LIMIT OPENAI_TOKEN_LIMIT OPENAI_DAILY_LIMIT OPENAI_LIMIT OPENAI_COST_LIMIT OPENAI_CONCURRENCY
OPENAI_CONCURRENCY_LIMIT OPENAI_MAX_CONCURRENT_REQUESTS OPENAI_MIN_CONCURRENCY OPENAI_MAX_WORKERS OPENAI_HEADERS
OPENAI_EXTRA_HEADERS OPENAI_SETTINGS OPENAI_SETUP OPENAI_TITLE OPENAI_REGION OPENAI_DEPLOYMENT OPENAI_SEAT_LIMIT
OPENAI_TOOLS OPENAI_STATUS OPENAI_BATCH_SIZE OPENAI_BATCH_WINDOW OPENAI_CACHE_TTL_SECONDS OPENAI AZURE_OPENAI_API_KEY
AZURE_OPENAI_ENDPOINT AZURE_OPENAI_TPM AZURE_OPENAI_TPM_LIMIT AZURE_OPENAI_MAX_CONCURRENCY ANTHROPIC_API_KEY
ANTHROPIC_MAX_CONCURRENCY LLM_TPM LLM_MAX_TOKENS MAX_CONCURRENCY MAX_CONCURRENT_REQUESTS TPM_LIMIT RPM_LIMIT
STAGGER_SECONDS REQUEST_TIMEOUT_SECONDS DEADLINE_SECONDS BACKOFF_BASE_SECONDS RETRY_MAX_ATTEMPTS JITTER_RATIO FINALIZE
FINALIZE_MODEL FINALIZE_TIMEOUT FINALIZE_ENABLED PREFLIGHT PREFLIGHT_MODEL PREFLIGHT_URL PREFLIGHT_CACHE PACELINE_DATA
PACELINE_REDIS_URL PACELINE_TEST_SEED PACELINE_LOG DATABASE_URL REDIS_URL PORT PATH HOME LANG LC_ALL PWD SHLVL _ DEBUG
SECRET_KEY SENTRY_DSN
"""

NEAR = """
OPENAI_STAGER_SECONDS OPENAI_STAGGER_SECONDS
OPENAI_STAGER_SECOND OPENAI_STAGGER_SECONDS
OPENAI_STAGGER OPENAI_STAGGER_SECONDS
OPENAI_STAGGER_S OPENAI_STAGGER_SECONDS
OPENAI_STAGGER_MS OPENAI_STAGGER_SECONDS
OPENAI_STAGGER_DELAY OPENAI_STAGGER_SECONDS
OPENAI_SECONDS_STAGGER OPENAI_STAGGER_SECONDS
OPENAI_TPM_LIMITS OPENAI_TPM_LIMIT
OPENAI_TMP_LIMIT OPENAI_TPM_LIMIT
OPENAI_TPM_LIMT OPENAI_TPM_LIMIT
OPENAI_TPMLIMIT OPENAI_TPM_LIMIT
OPENAI-TPM-LIMIT OPENAI_TPM_LIMIT
openai_tpm_limit OPENAI_TPM_LIMIT
OPEN_AI_TPM_LIMIT OPENAI_TPM_LIMIT
OPNEAI_TPM_LIMIT OPENAI_TPM_LIMIT
OPENAI_LIMIT_TPM OPENAI_TPM_LIMIT
PACELINE_TPM_LIMIT OPENAI_TPM_LIMIT
OPENAI_RPM_LIMITS OPENAI_RPM_LIMIT
OPENAI_HEADROOM OPENAI_TPM_HEADROOM
OPENAI_TPM_HEADROM OPENAI_TPM_HEADROOM
OPENAI_TPM_LIMIT_HEADROOM OPENAI_TPM_HEADROOM
OPENAI_RPM_HEADROOM OPENAI_TPM_HEADROOM
OPENAI_MAX_CONCURENCY OPENAI_MAX_CONCURRENCY
OPENAI_MAX_CONCURRENT OPENAI_MAX_CONCURRENCY
OPENAI_MAXCONCURRENCY OPENAI_MAX_CONCURRENCY
OPENAI_RETRY_MAX_ATTEMPT OPENAI_RETRY_MAX_ATTEMPTS
OPENAI_MAX_RETRY_ATTEMPTS OPENAI_RETRY_MAX_ATTEMPTS
OPENAI_BACKOFF_BASE OPENAI_BACKOFF_BASE_SECONDS
OPENAI_BACKOFF_BASE_SEC OPENAI_BACKOFF_BASE_SECONDS
OPENAI_BACKOFF_CAP_SEC OPENAI_BACKOFF_CAP_SECONDS
OPENAI_EST_TOKEN_PER_RUN OPENAI_EST_TOKENS_PER_RUN
OPENAI_REQUEST_TIMEOUT_SECS OPENAI_REQUEST_TIMEOUT_SECONDS
OPENAI_DEADLINE OPENAI_DEADLINE_SECONDS
OPENAI_SETTLES OPENAI_SETTLE
OPENAI_LAUNCH_ODER OPENAI_LAUNCH_ORDER
FINALIZE_LOWER_CONCURRENCY FINALIZE_LOWERS_CONCURRENCY
OPENAI_FINALIZE_LOWERS_CONCURRENCY FINALIZE_LOWERS_CONCURRENCY
OPENAI_FINALIZE_MAX_TOKENS FINALIZE_MAX_TOKENS
FINALIZE_MAX_TOKEN FINALIZE_MAX_TOKENS
OPENAI_PREFLIGHT_MODE PREFLIGHT_MODE
PREFLIGTH_MODE PREFLIGHT_MODE
PACELINE_LIMIT PACELINE_LIMITS
PACELINE_LIMTS PACELINE_LIMITS
"""


class TestNames:
    def test_foreign_names_are_left_alone_whatever_they_hold(self) -> None:
        assert [name for name in FOREIGN.split() if near_miss(name)] == []
        assert Policy.from_env(dict.fromkeys(FOREIGN.split(), "sk-not a number")) == Policy()

    @pytest.mark.parametrize(("name", "meant"), [line.split() for line in NEAR.split("\n") if line])
    def test_a_near_miss_says_what_was_meant_and_not_what_it_held(self, name: str, meant: str) -> None:
        with pytest.raises(BadSetting) as caught:
            Policy.from_env({name: "sk-secret"})
        assert str(caught.value) == f"there is no setting '{name}': did you mean {meant}?"
        # Even where it holds nothing: the name is a mistake all the same.
        with pytest.raises(BadSetting):
            Policy.from_env({name: ""})

    def test_our_own_names_are_never_near_another(self) -> None:
        assert [knob.env for knob in KNOBS if near_miss(knob.env)] == []

    def test_any_single_slip_in_a_long_word_is_found(self, seed: int) -> None:
        """Drop, double, replace or swap one letter anywhere behind the prefix: always near, and near the right one."""
        rng = random.Random(seed)
        for knob in KNOBS:
            start = len("OPENAI_") if knob.env.startswith("OPENAI_") else 0
            for i in range(start, len(knob.env) - 1):
                name, letter = knob.env, rng.choice("JVXZ")  # which no foreign word like QPM or RPS has
                slips = {
                    name[:i] + name[i + 1 :],
                    name[:i] + name[i] + name[i:],
                    name[:i] + letter + name[i + 1 :],
                    name[:i] + name[i + 1] + name[i] + name[i + 2 :],
                }
                for slip in slips - set(KNOB_BY_ENV):
                    # Where a separator is hit, words run together or apart, which only equal letters can tell.
                    if slip.count("_") != name.count("_") or "_" in name[i : i + 2]:
                        continue
                    meant = near_miss(slip)
                    assert meant is not None, slip
                    # A slip in a short word (TPM, RPD) may land between two knobs: then either will do.
                    assert meant == name or re.search("_[RT]P[MD]", name), slip


class TestWriting:
    @given(policies)
    def test_what_is_written_reads_back_equal(self, policy: Policy) -> None:
        for text in (policy.to_env(), policy.to_env(everything=True), policy.to_env(Policy.preset("paceline"))):
            read = Policy.from_env(parse(text))
            assert read == policy
            assert read.model_fields_set >= policy.model_fields_set

    @given(policies, policies)
    def test_old_values_stand_beside_exactly_the_changed_ones(self, policy: Policy, old: Policy) -> None:
        text = policy.to_env(old)
        differing = [k for k in KNOBS if getattr(old, k.name) != getattr(policy, k.name)]
        changed = {k.env: k.text(getattr(old, k.name)) for k in differing}
        pairs = re.findall(r"^# was: (.*)\n(\w+)=", text, re.MULTILINE)
        assert {env: value for value, env in pairs} == changed
        assert len(pairs) == text.count("# was:")
        assert set(parse(text)) >= set(changed)
        # On top of the old file, the new one gives the new policy: that is how it is used.
        assert Policy.from_env(parse(old.to_env()) | parse(text)) == policy

    def test_defaults_are_left_out_unless_named_or_asked_for(self) -> None:
        assert Policy().to_env() == ""
        assert list(parse(Policy().to_env(everything=True))) == [row[0] for row in ROWS]
        assert parse(Policy(tpm_limit=30_000).to_env()) == {"OPENAI_TPM_LIMIT": "30000"}

    def test_a_block_reads_as_it_should(self) -> None:
        assert Policy(max_concurrency=20, stagger_seconds=0.25).to_env(Policy()) == (
            "# requests in flight, at most: a whole number from 1 to 100,000 (requests)\n"
            "# was: 3\n"
            "OPENAI_MAX_CONCURRENCY=20\n"
            "\n"
            "# time between two launches: a number from 0 to 3,600 (s)\n"
            "# was: 15\n"
            "OPENAI_STAGGER_SECONDS=0.25\n"
        )


class TestParams:
    def test_the_guardrails_as_numbers(self) -> None:
        p = Policy().params()
        assert (p.max_concurrency, p.stagger_s, p.max_attempts, p.backoff_base_s) == (3, 15.0, 5, 2.0)
        assert p.window[:4] == [law.FIXED, law.FIXED, law.BUCKET, law.BUCKET]
        assert p.limit == [30_000.0, *[0.0] * 7]
        assert p.budget == [25_500.0, *[math.inf] * 7]
        assert (p.finalize_lowers, p.finalize_max_concurrency, p.backoff_keeps_permit) == (1, 2, 1)
        assert not any(p.settles)

    def test_the_headroom_applies_to_every_limit(self) -> None:
        policy = Policy(tpm_limit=30_000, rpm_limit=500, tpd_limit=90_000, rpd_limit=200, tpm_headroom=0.1)
        p = policy.params()
        assert p.limit[:4] == [30_000.0, 500.0, 90_000.0, 200.0]
        assert p.budget[:4] == [27_000.0, 450.0, 81_000.0, 180.0]
        assert p.rate_per_s[:4] == pytest.approx([450.0, 7.5, 81_000 / 86_400, 180 / 86_400])

    def test_windows_and_order(self) -> None:
        windows = {w: Policy().with_(tpm_window=w).params().window[law.RPM] for w in ("fixed", "sliding", "bucket")}
        assert windows == {"fixed": law.FIXED, "sliding": law.SLIDING, "bucket": law.BUCKET}
        assert Policy().params().longest_first == 0
        assert Policy.preset("paceline").params().longest_first == 1

    @given(policies)
    def test_every_allowed_policy_makes_finite_params(self, policy: Policy) -> None:
        p = policy.params()
        for d in range(law.DIMENSIONS):
            assert (p.limit[d] > 0.0 or p.sought[d] > 0.0) == (p.budget[d] < math.inf)
            assert p.rate_per_s[d] > 0.0
            # At least one, and never more than granted but where a single one is.
            assert 1.0 <= p.budget[d] <= max(1.0, p.limit[d] or math.inf)

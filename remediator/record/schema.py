"""The tables of the record. Times are of the record's clock; `starts_at` is Alertmanager's own text."""

from sqlalchemy import (
    JSON,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData()

# The record's clock when it was last stored: a single row.
clock = Table(
    "clock",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("boot", String, nullable=False),
    Column("running", Float, nullable=False),  # seconds since the machine was started
    Column("calendar", Float, nullable=False),  # Unix time
    Column("steady", Float, nullable=False),
)

# Named points in time, such as when the last Watchdog alert was received; see record/timestamps.py.
timestamps = Table(
    "timestamps",
    metadata,
    Column("name", String, primary_key=True),
    Column("at", Float, nullable=False),
    Column("detail", JSON, nullable=False),
)

maintenance = Table(
    "maintenance",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("scope", String, nullable=False),  # service, host, group
    Column("name", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("asked_by", String, nullable=False),
    Column("begun_at", Float, nullable=False),
    Column("until", Float, nullable=False),
    Column("ended_at", Float),  # when an operator ended it before `until`
    Column("notify", Integer, nullable=False, server_default="0"),  # 1: notifications mention people as usual
    Column("pause_probing", Integer, nullable=False, server_default="0"),  # 1: probed only on request
)

# Services that an operator stopped through Defib, until they are up again.
stops = Table(
    "stops",
    metadata,
    Column("service", String, primary_key=True),
    Column("at", Float, nullable=False),
    Column("asked_by", String, nullable=False),
    Column("action_id", Integer, nullable=False),  # the action that stopped it
    Column("reason", String, nullable=False, server_default=""),
)

incidents = Table(
    "incidents",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("service", String, nullable=False),  # or ALERT@HOST, for an alert of a host with runbooks
    Column("state", String, nullable=False),  # open, recovered, unobserved
    Column("opened_at", Float, nullable=False),
    Column("closed_at", Float),  # NULL while it is open
    Column("recovered_by", String),  # defib, person, self
    Column("labels", JSON(none_as_null=True)),  # of the first alert to act on; NULL if there was none
    Column("down_at", Float),  # when that alert was received: the outage's start, which may be after `opened_at`
    Column("probe", Text),  # the reason and message of the last failed probe
    # The last decision; only changes of it are recorded in the timeline.
    Column("verb", String),
    Column("reason", String),
    Column("detail", Text),
    Column("queued_since", Float),  # since when it has waited for capacity or approval only
    Column("healing_since", Float),  # since when the host has been seen to restart it
    Column("starting_since", Float),  # since when `starting` has held
    Column("stopped_run", Text),  # the run of the target that somebody stopped
    Column("stopped_why", Text),
    Column(
        "quiet", Integer, nullable=False, server_default="0"
    ),  # 1: not notified, because an operator stopped the service
    Column("person_needed_at", Float),  # since when automation has ended without recovery; NULL while it continues
    Column("acknowledged_by", String),
    Column("acknowledged_at", Float),
    Index("one_open_incident", "service", unique=True, sqlite_where=text("state = 'open'")),
    Index("incidents_of_service", "service", "opened_at"),
    Index("incidents_by_start", "opened_at"),
    Index("incidents_by_end", "closed_at"),
)

alerts = Table(
    "alerts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("fingerprint", String, nullable=False),
    Column("starts_at", String, nullable=False),
    Column("status", String, nullable=False),  # firing, resolved
    Column("resolved_by", String),  # alertmanager, reconciliation
    Column("times", Integer, nullable=False),  # how often it began to fire
    Column("name", String, nullable=False),
    Column("incident_id", Integer, ForeignKey("incidents.id")),
    Column("labels", JSON, nullable=False),
    Column("annotations", JSON, nullable=False),
    Column("ends_at", String),
    Column("first_seen", Float, nullable=False),
    Column("last_seen", Float, nullable=False),
    Column("acknowledged_by", String),
    Column("acknowledged_at", Float),
    Column("starts", JSON(none_as_null=True)),  # whether it fires, by startsAt; NULL: `starts_at` only
    Column("held_at", Float),  # when its end was received, while that waits for evidence
    Column("doubted_at", Float),  # when a firing copy was received after its end, until the exporter was asked
    UniqueConstraint("fingerprint", "starts_at"),
    Index("alerts_in_doubt", "doubted_at", sqlite_where=text("doubted_at IS NOT NULL")),
    Index("alerts_of_incident", "incident_id"),
    Index("alerts_by_status", "status", "name"),
)

timeline = Table(
    "timeline",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("incident_id", Integer, ForeignKey("incidents.id"), nullable=False),
    Column("at", Float, nullable=False),
    Column("event", String, nullable=False),
    Column("detail", JSON, nullable=False),
    Index("timeline_of_incident", "incident_id", "at"),
)

actions = Table(
    "actions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("incident_id", Integer, ForeignKey("incidents.id")),
    Column("service", String, nullable=False),
    Column("host", String, nullable=False),
    Column("target", Text, nullable=False, server_default=""),  # identifies what is acted on, on the host
    Column("kind", String, nullable=False),  # restart, recreate, start, stop, reset, runbook NAME
    Column("component", String, nullable=False, server_default=""),  # that is restarted; empty: the whole service
    Column("requested_by", String, nullable=False),  # alert, person
    Column("asked_by", String, nullable=False),  # the names of the alerts, or the operator
    Column("overruled", JSON, nullable=False),  # the gates that an operator overruled
    Column("step", JSON(none_as_null=True)),  # the step that waits for approval
    Column("approved_by", String),
    Column("approved_at", Float),
    Column("state", String, nullable=False),  # queued, running, then succeeded, failed, unknown, cancelled
    Column("counts", Integer, nullable=False),  # 1: counts as an attempt; 0: an operator's, or the host was not reached
    Column("proof_at", Float),  # when the failed probe that allowed it was requested
    Column("claimed_at", Float, nullable=False),
    Column("command", String),  # succeeded, failed, unknown; NULL while it is running
    Column("command_ended_at", Float),
    Column("exit_status", Integer),
    Column("output", Text),
    Column("up_at", Float),  # the first probe after it that saw the service or component up; the alert's end
    Column("ended_at", Float),
    Column("why", Text),
    Column("blocked", String),  # host-key-changed, sudo-refused, shell-refused
    Column("before", JSON(none_as_null=True)),  # the target's state, start, process, restarts
    Column("after", JSON(none_as_null=True)),
    Index("one_running_action", "service", unique=True, sqlite_where=text("state = 'running'")),
    Index("one_action_on_a_target", "host", "target", unique=True, sqlite_where=text("state = 'running'")),
    Index("one_queued_action", "incident_id", unique=True, sqlite_where=text("state = 'queued'")),
    Index("actions_of_service", "service", "claimed_at"),
    Index("actions_of_target", "host", "target", "claimed_at"),
    Index("actions_by_time", "claimed_at"),
    Index("actions_by_end", "ended_at"),
    Index("actions_of_incident", "incident_id"),
)

# What a restart would destroy, and the probes before and after it.
evidence = Table(
    "evidence",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("action_id", Integer, ForeignKey("actions.id"), nullable=False),
    Column("name", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("text", Text, nullable=False),
    Index("evidence_of_action", "action_id"),
)

notifications = Table(
    "notifications",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("channel", String, nullable=False),
    Column("key", String, nullable=False),  # what it is about; a channel gets one notification per key
    Column("kind", String, nullable=False),  # down, restarted, person_needed, recovered, unobserved, alert, …
    Column("group_key", String, nullable=False),  # alerts without a service: the alert's name; otherwise empty
    Column("severity", String, nullable=False),
    Column("incident_id", Integer, ForeignKey("incidents.id")),
    Column("alert_id", Integer),
    Column("content", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("pending_since", Float, nullable=False),
    Column("state", String, nullable=False),  # pending, sent, dead
    Column("tries", Integer, nullable=False),
    Column("not_before", Float, nullable=False),
    Column("ended_at", Float),
    Column("response", Text),  # of the channel's server to the last attempt, or why there was none
    Column("sent_with", Integer),  # the notification whose message contains this one
    Column("retry_state", JSON(none_as_null=True)),  # what the channel stores for the next attempt
    # A card shows the present state: a change of what it shows raises `version` and makes it pending again.
    Column("card", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("message_id", String),
    Column("message_at", Float),
    Column("replacements", Integer, nullable=False),  # how often its message could not be updated or replied to
    Column("foreign_alert", Integer, nullable=False, server_default="0"),  # 1: of no service or host in the inventory
    UniqueConstraint("channel", "key"),
    Index("notifications_to_send", "state", "channel", "id"),
    Index("notifications_by_key", "key"),
    Index("notifications_of_incident", "incident_id", "kind", "card"),  # of some kinds there may be thousands
    Index("notifications_of_alert", "alert_id"),
    Index("notifications_of_message", "message_id"),
)

# Attempts to send a message.
deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("notification_id", Integer, ForeignKey("notifications.id"), nullable=False),  # the first of the message
    Column("bot", String, nullable=False),  # identifies the bot, for which the rate limits hold
    Column("at", Float, nullable=False),
    Column("outcome", String),  # sent, retry, resend, reject, unknown; NULL: no response was recorded
    Column("response", Text),
    Index("deliveries_of_bot", "bot", "at"),
    Index("deliveries_of_notification", "notification_id"),
)

# API tokens, with a digest instead of their secret.
api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False),
    Column("role", String, nullable=False),  # viewer, operator, admin
    Column("digest", String, nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("created_by", String, nullable=False),
    Column("expires_at", Float),
    Column("last_used_at", Float),
    Column("revoked_at", Float),  # NULL while it is in force
    Column("revoked_by", String),
    Index("one_api_token_of_a_name", "name", unique=True, sqlite_where=text("revoked_at IS NULL")),
)

# Sessions of people who signed in with a browser, by a digest of the id in their cookie.
sessions = Table(
    "sessions",
    metadata,
    Column("digest", String, primary_key=True),
    Column("user", String, nullable=False),
    Column("method", String, nullable=False),  # password, oidc, feishu
    Column(
        "credential", String, nullable=False
    ),  # a digest of the password's hash or of the API token, or the provider
    Column("groups", JSON, nullable=False),  # of the sign-in service
    Column("address", String, nullable=False),
    Column("browser", String, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("last_used_at", Float, nullable=False),
)

# The audit log. A trigger refuses changes of its rows.
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("event", String, nullable=False),  # sign_in, sign_out, access, or the name of an operation
    Column("name", String, nullable=False),
    Column("verified", Integer, nullable=False),  # 0: the name is only what the caller claims
    Column("means", String, nullable=False),  # console, proxy, password, token, cli, chat
    Column("address", String, nullable=False),
    Column("target", String, nullable=False),
    Column("outcome", String, nullable=False),  # done, refused, failed
    Column("detail", Text, nullable=False),
    Column("count", Integer, nullable=False),  # more than 1: equal refusals within a minute
    Column("action_id", Integer),  # the action that the operation started
    Index("audit_by_time", "at"),
    Index("audit_of_target", "target", "at"),
    sqlite_autoincrement=True,  # so that no id is given again after the newest entries were deleted
)

# Changes of state, copied from the exporter, and gaps where events were lost. `at` is never changed, since pages are
# ordered by it; the cursor of the copy is the timestamp `exporter-events`.
events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),  # of the first of collapsed events; where a gap begins
    Column("last_at", Float),  # of the last of collapsed events; where a gap ends; NULL: there was one event
    Column("kind", String, nullable=False),  # service, host, container, unit, program, gpu, gap
    Column("host", String, nullable=False),
    Column("name", String, nullable=False),
    Column("state", String, nullable=False),  # after the last of collapsed events
    Column("detail", Text, nullable=False),
    Column("times", Integer, nullable=False),  # how many events were collapsed
    Index("events_by_time", "at"),
    Index("events_of_kind", "kind", "at"),
    Index("events_of_host", "host", "kind", "at"),
    Index("events_of_name", "kind", "name", "at"),
)

# Buttons that people pressed on cards; the event's id is the chat's.
button_presses = Table(
    "button_presses",
    metadata,
    Column("event_id", String, primary_key=True),
    Column("at", Float, nullable=False),
    Column("channel", String, nullable=False),
    Column("open_id", String, nullable=False),
    Column("who", String, nullable=False),  # the person's name in the inventory; empty if there is none
    Column("button", String, nullable=False),
    Column("ids", JSON, nullable=False),  # of the incident, alert, action or notification
    Column("outcome", String),  # NULL while it is carried out
)

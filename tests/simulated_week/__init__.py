"""A simulated week: how many notifications of a normal week need no action, and how soon every fault is notified.

20 hosts, 100 services and a gateway live through seven days, once a minute. What they would publish is written into a real
Prometheus, the expressions of `alerts/rules` are evaluated by its `query_range`, and what fires passes through the
routing of `alerts/alertmanager.yml` and the rules by which the remediator notifies. Run it with `make week`.

What is real: the configuration with its defaults, the schedule of probes, the debouncing of services and the lines of
`/metrics` about them; the metric names and labels of collectors, which are compared with the exporter's and with
docs/metrics.md; the rules, and Prometheus. What is modelled: the behaviour of services and hosts (`events`, `services`,
`hosts`), the pending time of alerts (`evaluation`), and Alertmanager and the remediator (`notifications`).

One notification is one new message about a problem that begins: the card of an incident, or of an alert that is not
part of one. The end of a problem is none, since the card is updated. Alerts of the same name that begin together are
counted one by one, although the remediator combines them in one message, and so are problems that a digest would contain.

A notification needs no action unless one of the listed faults (`events.FAULTS`) has caused it: the fault lists the
alerts that it may cause, on its own host or service and in its own time. Everything else counts, also notifications of
the normal week with which somebody might do something, such as a failed unit. The counts are scaled to 50 hosts and
300 services: what concerns a service by 3, a host by 2.5, and Defib itself by 1.
"""

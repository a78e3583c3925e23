"""What discovery knows of programs by their names: providers, ports that are not HTTP, and what is no service."""

import re
from collections.abc import Mapping

# A part of the name of a program or an image, with provider and category of its service. The first match counts.
_PROVIDERS: tuple[tuple[str, str, str], ...] = (
    ("mineru", "mineru", "ocr"), ("vllm", "vllm", "llm"), ("sglang", "sglang", "llm"), ("ollama", "ollama", "llm"),
    ("tritonserver", "triton", "llm"), ("llama", "llama.cpp", "llm"), ("open-webui", "open-webui", "web"),
    ("nginx", "nginx", "web"), ("apache2", "apache", "web"), ("httpd", "apache", "web"), ("caddy", "caddy", "web"),
    ("traefik", "traefik", "web"), ("haproxy", "haproxy", "web"), ("gunicorn", "python", "web"),
    ("uvicorn", "python", "web"), ("postgres", "postgresql", "database"), ("mariadb", "mysql", "database"),
    ("mysql", "mysql", "database"), ("mongo", "mongodb", "database"), ("redis", "redis", "database"),
    ("valkey", "redis", "database"), ("memcached", "memcached", "database"),
    ("elasticsearch", "elasticsearch", "database"), ("opensearch", "opensearch", "database"),
    ("clickhouse", "clickhouse", "database"), ("milvus", "milvus", "database"), ("qdrant", "qdrant", "database"),
    ("rabbitmq", "rabbitmq", "queue"), ("kafka", "kafka", "queue"), ("nats", "nats", "queue"),
    ("minio", "minio", "storage"), ("grafana", "grafana", "monitoring"), ("alertmanager", "prometheus", "monitoring"),
    ("prometheus", "prometheus", "monitoring"),
)  # fmt: skip

# Ports on which other protocols are usual. They get no HTTP request, which such servers log as an error or punish.
PROTOCOLS: Mapping[int, str] = {
    21: "FTP", 22: "SSH", 25: "SMTP", 53: "DNS", 110: "POP3", 139: "SMB", 143: "IMAP", 389: "LDAP", 445: "SMB",
    465: "SMTPS", 587: "SMTP", 636: "LDAPS", 993: "IMAPS", 995: "POP3S", 1433: "SQL Server", 1521: "Oracle",
    1883: "MQTT", 2049: "NFS", 3306: "MySQL", 3389: "RDP", 5432: "PostgreSQL", 5672: "AMQP", 6379: "Redis",
    9092: "Kafka", 11211: "memcached", 27017: "MongoDB",
}  # fmt: skip

# Units that start what belongs to others: a process in their control group may be anything.
MANAGERS = re.compile(r"(docker|containerd|podman|crio|kubelet|supervisord?|sshd?|cron|crond|atd|user@\d+)\.service")

# Units, by the part of their name before `.service`, and processes that are not proposed: the operating system's own,
# what Defib itself depends on, and Defib.
_NO_SERVICES = re.compile(
    r"systemd-.*|sshd?(@.*)?|sshd-session|dbus(-.*)?|polkit(d)?|getty@.*|serial-getty@.*|console-getty|init|login|"
    r"docker(d|-proxy)?|containerd(-shim.*)?|podman|crio|kubelet|supervisord?|user@.*|user-runtime-dir@.*|"
    r"NetworkManager.*|networkd-dispatcher|wpa_supplicant|ModemManager|chronyd?|ntpd?|ntpsec|timesyncd|rsyslogd?|"
    r"syslog-ng|cron|crond|atd|anacron|avahi-daemon|cups(d|-browsed)?|bluetooth(d)?|rpcbind|rpc[.-].*|nfs-.*|"
    r"udisks2|upower|accounts-daemon|snapd(\..*)?|packagekit|unattended-upgrades|multipathd|irqbalance|smartd|"
    r"smartmontools|thermald|tuned|acpid|auditd|firewalld|ufw|fail2ban(-server)?|apparmor|lvm2-.*|mdmonitor|iscsid|"
    r"qemu-guest-agent|open-vm-tools|vmtoolsd|cloud-.*|gdm3?|gssproxy|sssd|resolvconf|connmand|dnsmasq@.*|"
    r"nvidia-persistenced|nvidia-fabricmanager|nv-fabricmanager|node_exporter|prometheus-node-exporter|"
    r"defib(-exporter|-remediator|-.*)?|emergency|rescue|kmod.*|ifup@.*|networking|keyboard-setup|console-setup"
)
SHELLS = frozenset({"sh", "bash", "ash", "dash", "zsh", "sleep infinity", "tail -f /dev/null"})
# Parts of the names of models that have no completions.
NO_COMPLETIONS = re.compile(r"embed|rerank|bge-|gte-|(?:^|[/_-])e5-|whisper|tts", re.IGNORECASE)


def find_provider(*names: str) -> tuple[str, str]:
    """Return provider and category by the names of a program, its image or its endpoint; `other` if none is known."""
    for name in names:
        for part, provider, category in _PROVIDERS:
            if part in name.lower():
                return provider, category
    return "other", "other"


def is_no_service(name: str) -> bool:
    """Whether a unit or process is not to be proposed."""
    return _NO_SERVICES.fullmatch(name.removesuffix(".service")) is not None


def starts_nothing(command: str) -> bool:
    """Whether a container's command, as docker shortens it, is only a shell or waits."""
    words = command.rstrip("…").split()
    program = words[0].rpartition("/")[2] if words else ""
    return (program in SHELLS and len(words) == 1) or " ".join([program, *words[1:]]) in SHELLS

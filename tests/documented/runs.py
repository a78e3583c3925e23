"""How the commands of the documentation run: the tables that a new command may need an entry in."""

from dataclasses import dataclass

from tests.documented.machines import CHECKOUT


@dataclass(frozen=True)
class Run:
    """How a command runs that needs more than what is written.

    `before` and `after` are scripts. `instead` is what runs instead of the command; `answers` are replaced in it. `status`
    are the exit statuses that the documentation promises, `prints` is a regular expression for the output, and `sample` a
    line of it that the documentation shows.
    """

    before: str = ""
    after: str = ""
    instead: str = ""
    answers: tuple[tuple[str, str], ...] = ()
    status: tuple[int, ...] = (0,)
    prints: str = ""
    sample: str = ""
    on_host: bool = False


BACKUP = "/var/backups/defib/defib-20261126T030000.db"
# `defib backup FILE` names the heartbeats after the record; in a folder, all files are named by the time.
NAME_HEARTBEATS = f"cp {BACKUP.removesuffix('.db')}.heartbeats.db /var/backups/defib/heartbeats-20261126T030000.db"
END_MAINTENANCE = "for id in $(defib --json maintenance | jq '.maintenance[].id'); do defib maintenance end $id; done"
SET_UP = "defib host setup gpu-01 --from 10.0.0.5 --apply admin"
# `defib host setup` changes no account that was created by hand, as one of the blocks does.
REMOVE_ACCOUNT = "ssh -o StrictHostKeyChecking=no admin@10.0.0.11 sudo userdel --force --remove defib"
DROP_INS = "/etc/systemd/system/defib-exporter.service.d"
# Backups in a directory are named by the second.
IN_NEXT_SECOND = "while [ -e /var/backups/defib/defib-$(date -u +%Y%m%dT%H%M%S).db ]; do sleep 0.1; done"
ARCHIVE = "/var/backups/defib/config-20261126T030000.tar.gz"
SWITCH_ON = "defib automation on --reason test"

GATEWAY = (
    "{token: a-token-for-admins-only, default: nvidia, state_file: /var/lib/defib-gateway/state, upstreams: "
    "{nvidia: {url: 'https://integrate.api.nvidia.com/v1', api_key: '${file:secrets/nvidia_api_key}'}}}"
)
CREATE_URL = "http://127.0.0.1:9998/ping/$(cat /var/lib/defib-exporter/ping_key)/backup-db-07?create=1"

# By their first lines without comments. Those of STORY run first, in this order.
BLOCKS = {
    "sudo deploy/install.sh": Run(after="until-ready && configure && fire ocr && fire guarded"),
    "sudo sed -i": Run(after="until curl -fs http://127.0.0.1:9090/-/ready; do sleep 0.1; done"),
    "ssh-keygen -t ed25519": Run(
        after="chown defib-exporter /etc/defib/read_ed25519; cp /etc/defib/read_ed25519.pub $SHARED"
    ),
    "useradd --system": Run(
        answers=(("ssh-ed25519 AAAA… defib-read", "'\"$(cat $SHARED/read_ed25519.pub)\"'"),), on_host=True
    ),
    "defib discover --known-hosts gpu-01 gpu-02": Run(
        answers=(("gpu-02\n", "gpu-02 --yes\n"),), prints=r"gpu-02 .*SHA256:.* new\n"
    ),
    "defib host setup gpu-01": Run(before=REMOVE_ACCOUNT, prints=r"(?m)^\[1/1\] gpu-01: changed$"),
    "make install": Run(
        before="systemctl stop defib-exporter",
        answers=(
            ("make install", ":"),
            ("defib exporter", "while-serving http://127.0.0.1:9999/metrics defib exporter"),
        ),
        prints=r"config: 0 hosts, 1 service, no errors\nwiki is up\n",
        after="systemctl start defib-exporter && until-ready",
    ),
    "umask 077": Run(prints=r"\"verb\": \"restart\"|\"kind\": \"restart\""),
    "source <(defib": Run(answers=(("bash)", "bash) && complete -p defib"),), prints="complete .* defib"),
    "defib check": Run(answers=(("defib doctor ", "defib doctor || [ $? = 1 ] "),), prints=r"wiki is up\n"),
    "defib discover gpu-01": Run(prints=r"port-8080-gpu-01"),
    "defib discover --known-hosts --all": Run(prints=r"\n3 hosts: .*already set up\n"),
    "sudo systemctl stop": Run(
        before=f"[ -e {BACKUP} ] || defib backup {BACKUP}; {NAME_HEARTBEATS}", after="until-ready"
    ),
    "sudo defib backup --config /etc/defib /var/backups/defib": Run(
        before=IN_NEXT_SECOND, answers=(("git pull &&", ""),), after="until-ready"
    ),
    "sudo defib backup --config /etc/defib /var/backups/defib --keep 30d": Run(before=IN_NEXT_SECOND),
    "sudo chown defib-gateway": Run(
        before=f"cd /etc/defib && echo nvapi-key >secrets/nvidia_api_key && cat >gateway.yaml <<'EOF'\ngateway: {GATEWAY}\nEOF",
        answers=(
            ("--now defib-gateway", "--now defib-gateway; until curl -fs 127.0.0.1:9190/-/ready; do sleep 0.1; done"),
        ),
        prints="PASS  gateway: ready",
        after="systemctl stop defib-gateway; rm /etc/defib/gateway.yaml /etc/defib/secrets/nvidia_api_key",
    ),
    "sudo mkdir -m 700 /root/restored": Run(
        before=f"{IN_NEXT_SECOND}; defib backup /var/backups/defib && cp $(ls /var/backups/defib/config-*.gz | tail -n 1) {ARCHIVE}",
        prints="no errors",
    ),
    "defib init config --host": Run(
        before="echo https://open.feishu.cn/open-apis/bot/v2/hook/x >hook && echo s3cret >secret",
        answers=(
            ("srv-[01-20]", "srv-[11-12]"),
            ("defib doctor ", "defib doctor || [ $? = 1 ] "),  # it cannot reach Feishu, and nothing runs yet
        ),
        prints=r"\n2 hosts: [12] changed",
        after="cd / && defib host setup --all --from 10.0.0.5 --apply admin",  # the keys of the other configuration
    ),
    "defib maintenance begin service ocr": Run(after=END_MAINTENANCE),
    "curl -fsS -m 10 --retry 5 'http://10.0.0.5:9998/ping/PING_KEY/backup-db-07?create=1'": Run(
        answers=(("'http://10.0.0.5:9998/ping/PING_KEY/backup-db-07?create=1'", CREATE_URL),),
        prints="^(Created|OK)$",
    ),
}
STORY = (
    "sudo deploy/install.sh", "sudo sed -i", "ssh-keygen -t", "useradd --system", "defib discover --known-hosts gpu-01 gpu-02",
    "defib host setup gpu-01",
)  # fmt: skip

# By the command, each of the choices that it leaves, or a regular expression for the whole of it.
COMMANDS = {
    r".*\bdefib doctor\b.*": Run(
        status=(0, 1), prints=r"(?m)^(PASS|WARN|FAIL) "
    ),  # a service is down, there is no Grafana
    # A service that was down is unknown for some probes after an exporter restart.
    "defib status": Run(
        before="until defib status | grep -E '^[0-9]+ down'; do sleep 0.5; done", status=(1,), prints=r"(?m)^\d+ down"
    ),
    "defib notify test oncall": Run(sample="oncall: 0: success"),
    "defib notify test tickets": Run(sample="tickets: HTTP 204"),
    "defib deadman": Run(
        instead="while-serving http://127.0.0.1:9193/-/ready"
        " defib deadman --channel oncall --listen 127.0.0.1:9193 --directory watcher"
    ),
    # Names of commands in a sentence, without their arguments.
    "defib probe": Run(instead="defib probe wiki"),
    "defib probe --json": Run(instead="defib probe wiki --json | jq .components"),
    "defib control … logs": Run(instead="defib control wiki logs"),
    "defib control --direct": Run(instead="defib control wiki status --direct"),
    "defib backup": Run(before=IN_NEXT_SECOND, instead="defib backup /var/backups/defib"),
    "0 3 .*/defib backup .*": Run(before=IN_NEXT_SECOND),
    "defib explain": Run(instead="defib explain wiki"),
    "defib reset": Run(instead="defib reset wiki"),
    "defib discover": Run(instead="defib discover gpu-01"),
    "defib discover --known-hosts": Run(instead="defib discover --known-hosts gpu-01"),
    "defib host setup": Run(instead="defib host setup gpu-01"),
    "defib host setup --apply": Run(instead=SET_UP, prints=r"(?m)^\[1/1\] gpu-01: already set up$"),
    "defib session end": Run(instead="defib session end $(sign-in)"),
    "defib init": Run(instead="defib init first"),
    # What only makes sense with something else.
    "defib init DIR": Run(instead="defib init first", prints=r"\nNext:\n"),
    "defib heartbeat url SERVICE": Run(
        instead="defib heartbeat url nightly-backup", prints=r"^http://127\.0\.0\.1:9998/ping/[0-9a-f-]{36}\n$"
    ),
    "defib heartbeat remove SLUG": Run(before=f"curl -fsS {CREATE_URL}", instead="defib heartbeat remove backup-db-07"),
    "defib heartbeat ping": Run(instead="defib heartbeat ping nightly-backup"),
    "defib heartbeat ping SERVICE": Run(instead="defib heartbeat ping nightly-backup"),
    "defib heartbeat run": Run(instead="defib heartbeat run nightly-backup -- echo done", prints=r"^done\n$"),
    "defib heartbeat run SERVICE -- COMMAND": Run(
        instead="defib heartbeat run nightly-backup -- echo done", prints=r"^done\n$"
    ),
    "defib exporter": Run(
        before="systemctl stop defib-exporter",
        instead="while-serving http://127.0.0.1:9999/-/ready sudo -u defib-exporter defib exporter",
        after="systemctl start defib-exporter && until-ready",
    ),
    "defib remediator": Run(
        before="systemctl stop defib-remediator",
        instead="while-serving http://127.0.0.1:9095/-/ready sudo -u defib defib remediator",
        after="systemctl start defib-remediator && until-ready",
    ),
    "defib restore FILE": Run(
        before="systemctl stop defib-remediator && defib backup /var/backups/defib/before.db",
        instead="defib restore /var/backups/defib/before.db",
        after="systemctl start defib-remediator && until-ready",
    ),
    "defib backup FILE --keep DURATION": Run(
        before=IN_NEXT_SECOND, instead="defib backup /var/backups/defib --keep 30d"
    ),
    "defib control SERVICE stop": Run(
        instead="for _ in 1 2 3 4 5; do until-idle; defib control wiki stop && exit; done; exit 1",  # others act on it
        after="until-idle && defib control wiki start",
    ),
    "defib control SERVICE restart --component NAME": Run(instead="defib control transcoder restart --component ch1"),
    "defib automation off( .*)?": Run(after=SWITCH_ON),
    "defib maintenance begin .*": Run(prints="^maintenance ", after=END_MAINTENANCE),
    "defib maintenance end ID": Run(
        before="defib maintenance begin host gpu-01 --for 2h --reason test",
        instead="defib maintenance end $(defib --json maintenance | jq '.maintenance[0].id')",
    ),
    "defib token revoke NAME": Run(
        before="defib token create short-lived --role viewer", instead="defib token revoke short-lived"
    ),
    "defib session end ID": Run(instead="defib session end $(sign-in)"),
    "defib silence --alert ID": Run(instead="defib silence --alert $(api /api/v1/alerts | jq '.alerts[0].id')"),
    "defib incidents ID": Run(instead="defib incidents 1"),
    "du .*": Run(instead="du -xh --max-depth=2 /etc | sort -h | tail"),  # of / it takes long
    "openssl rand .*": Run(prints=r"^[0-9a-f]{64}\n$"),
    "ssh-keygen -lf .*": Run(prints="SHA256:", on_host=True),
    "chown defib /etc/defib/control_ed25519": Run(before="touch /etc/defib/control_ed25519"),
    "chmod -R .*": Run(before="mkdir alerts grafana config-monitoring"),
    "sudo install .* ping_token .*": Run(before="echo a-token-of-the-watcher >ping_token"),
    "rm .*user.conf": Run(before=f"mkdir -p {DROP_INS} && touch {DROP_INS}/user.conf"),
    "systemctl restart defib-exporter": Run(after="until-ready"),
    r"\.venv/bin/defib check": Run(before="mkdir -p .venv/bin && ln -s /usr/local/bin/defib .venv/bin/"),
}
# What stands for something in commands. Those of `defib` must not have any other word in capitals.
PLACEHOLDERS = {
    r"\bSERVICE\b": "wiki",
    r"\bHOST( …)?(?!\w)": "gpu-01",
    r"--config DIR\b": "--config /etc/defib",
    r"\bVERB\b": "status",
    r"\bWORD …": "wiki",
    r"\bINCIDENT\b": "1",
    r"\bACTION\b": "$(waiting-action)",
    r"\bTEXT\b": "'a note'",
    r"\bCHANNEL\b": "oncall",
    r"\bbackup FILE\b": "backup /var/backups/defib/new.db",
    r"\btoken create NAME\b": "token create new-$RANDOM",
    r"\bservice NAME\b": "service wiki",
    r"\bhost NAME\b": "host gpu-01",
    r"\bgroup NAME\b": "group gpu",
    r"\bUNIT\b": "defib-exporter",
    r"\bPID\b": "$(cat /run/units/defib-exporter)",
    r"\bVERSION\b": "$(ls /opt/defib | grep -v current | head -n 1)",
    r"(?<![\w/])deploy/install\.sh\b": f"{CHECKOUT}/deploy/install.sh",
    r"^(?:[\d*]+ ){5}(\w+) ": r"sudo -u \1 ",  # a line of cron's tables
}

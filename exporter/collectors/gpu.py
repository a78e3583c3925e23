"""The `gpu` collector: the metrics that nvidia-smi reports for every GPU, and XIDs from the kernel log."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from exporter.collectors import CollectorKind
from exporter.collectors.base import Collector, CollectorFailure, CollectorOptions, ReadSections, require_output
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily
from fleet.host import gpu
from fleet.host.numbers import is_count
from fleet.host.sections import NOT_READ, Section, SectionOutput
from fleet.inventory.units import PositiveDuration
from fleet.shells import ENDED_BY_TIMEOUT

MAX_TIMEOUT = 70.0  # seconds, of which a wrapper gives nvidia-smi less than 60
XID_JITTER = 2.0  # seconds: the times are relative to the boot time, which the kernel computes anew at each reading
MIB, MHZ, PERCENT, MICROSECOND = 2.0**20, 1e6, 0.01, 1e-6
FIELDS, QUERY = "fields", "query"

FAMILIES = (
    MetricFamily("gpu_info", "gauge", "Information about a GPU that responded; always 1."),
    MetricFamily("gpu_count", "gauge", "Number of GPUs that responded."),
    MetricFamily("gpu_expected_count", "gauge", "Configured number of GPUs; absent if it is not configured."),
    MetricFamily("gpu_healthy", "gauge", "Whether the GPU responded without reporting a fault."),
    MetricFamily("gpu_mig_instance_info", "gauge", "A MIG instance of the GPU; always 1."),
    MetricFamily("gpu_utilization_ratio", "gauge", "Ratio of time in which at least one kernel was running."),
    MetricFamily(
        "gpu_memory_utilization_ratio", "gauge", "Ratio of time in which GPU memory was being read or written."
    ),
    MetricFamily("gpu_memory_total_bytes", "gauge", "Total GPU memory."),
    MetricFamily("gpu_memory_used_bytes", "gauge", "Used GPU memory."),
    MetricFamily("gpu_memory_reserved_bytes", "gauge", "GPU memory reserved by driver and firmware."),
    MetricFamily("gpu_memory_free_bytes", "gauge", "Free GPU memory."),
    MetricFamily("gpu_temperature_celsius", "gauge", "Temperature by sensor."),
    MetricFamily("gpu_power_watts", "gauge", "Power draw; recent GPUs report the average of a second."),
    MetricFamily("gpu_power_instant_watts", "gauge", "Power draw at the time of the reading."),
    MetricFamily("gpu_power_limit_watts", "gauge", "Power limit."),
    MetricFamily("gpu_clock_hertz", "gauge", "Current clock frequency by clock."),
    MetricFamily("gpu_fan_speed_ratio", "gauge", "Requested fan speed relative to its maximum."),
    MetricFamily("gpu_performance_state", "gauge", "Performance state (P-state); 0 is the highest performance."),
    MetricFamily("gpu_throttle_active", "gauge", "Whether clocks are currently reduced, by reason."),
    MetricFamily("gpu_throttle_seconds_total", "counter", "Time for which clocks have been reduced, by reason."),
    MetricFamily(
        "gpu_ecc_errors_total",
        "counter",
        "Number of ECC errors: volatile since the driver was loaded, aggregate over the lifetime of the GPU.",
    ),
    MetricFamily("gpu_remapped_rows", "gauge", "Number of remapped memory rows; pending and failure are 0 or 1."),
    MetricFamily("gpu_retired_pages", "gauge", "Number of retired memory pages; pending is 0 or 1."),
    MetricFamily(
        "gpu_recovery_needed", "gauge", "Whether the driver requests a recovery action; 1 with the action as a label."
    ),
    MetricFamily(
        "gpu_process_memory_bytes",
        "gauge",
        "GPU memory used by processes, by container; host for processes outside of containers.",
    ),
    MetricFamily(
        "gpu_xid_last_timestamp_seconds", "gauge", "Unix time at which the XID last appeared in the kernel log."
    ),
)

# Fields that become a sample: field, metric name, factor, labels.
_NUMBERS: tuple[tuple[str, str, float, Mapping[str, str]], ...] = (
    ("utilization", "gpu_utilization_ratio", PERCENT, {}),
    ("memory_utilization", "gpu_memory_utilization_ratio", PERCENT, {}),
    *((f"memory_{name}", f"gpu_memory_{name}_bytes", MIB, {}) for name in ("total", "used", "reserved", "free")),
    ("temperature", "gpu_temperature_celsius", 1.0, {"sensor": "gpu"}),
    ("memory_temperature", "gpu_temperature_celsius", 1.0, {"sensor": "memory"}),
    ("power", "gpu_power_watts", 1.0, {}),
    ("power_instant", "gpu_power_instant_watts", 1.0, {}),
    ("power_limit", "gpu_power_limit_watts", 1.0, {}),
    *((f"clock_{name}", "gpu_clock_hertz", MHZ, {"clock": name}) for name in ("sm", "memory", "graphics", "video")),
    ("fan", "gpu_fan_speed_ratio", PERCENT, {}),
    *(
        (f"ecc_{kind}_{scope}", "gpu_ecc_errors_total", 1.0, {"kind": kind, "scope": scope})
        for kind in ("corrected", "uncorrected")
        for scope in ("volatile", "aggregate")
    ),
    *((f"remapped_{kind}", "gpu_remapped_rows", 1.0, {"kind": kind}) for kind in ("correctable", "uncorrectable")),
    *((f"retired_{kind}", "gpu_retired_pages", 1.0, {"kind": kind}) for kind in ("single_bit", "double_bit")),
)
_BOOLEANS = {"Yes": 1, "Active": 1, "1": 1, "No": 0, "Not Active": 0, "0": 0}


class GpuCollectorOptions(CollectorOptions):
    """`gpus` is how many GPUs the host should have, `timeout` the longest duration of a reading."""

    timeout: Annotated[PositiveDuration, Field(le=MAX_TIMEOUT)] = 45.0
    gpus: Annotated[int, Field(ge=0, le=gpu.GPU_LIMIT)] | None = None


class GpuCollector(Collector[GpuCollectorOptions]):
    """Keeps the supported fields, the index of each PCI address, the XIDs since boot, and whether MIG is enabled."""

    max_readings = 4  # the fields and their values, twice after a driver change
    _fields: Mapping[str, str] | None = None
    _driver = ""
    _mig_enabled = False

    def __init__(self, options: GpuCollectorOptions, host: str) -> None:
        super().__init__(options, host)
        self._index_of: dict[str, str] = {}  # index by PCI address
        self._xids: dict[tuple[str, str], float] = {}  # when each was last seen, by PCI address and number

    @property
    def deadline(self) -> float:
        return self.options.timeout

    def sections(self) -> list[Section]:
        return [
            gpu.HELP_SECTION,
            gpu.build_nvidia_smi_section(()),
            gpu.PROCESSES_SECTION,
            gpu.XIDS_SECTION,
            gpu.INSTANCES_SECTION,
        ]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        samples.add("gpu_expected_count", self.options.gpus)  # first: also where the driver fails
        if self._fields is None:
            self._fields = await self._read_supported_fields(read, samples)
        outputs = await read(self._sections(self._fields))
        query = outputs.get(QUERY)
        if query is not None and "is not a valid field" in query.text:
            # The driver was replaced after its fields were read.
            self._fields = await self._read_supported_fields(read, samples)
            outputs = await read(self._sections(self._fields))
        self._add(outputs, list(self._fields), samples)

    async def _read_supported_fields(self, read: ReadSections, samples: CollectorSamples) -> Mapping[str, str]:
        # If the driver hangs, only the kernel log can be read.
        outputs = await read((gpu.XIDS_SECTION, gpu.HELP_SECTION))
        try:
            fields = gpu.map_fields_to_driver_names(require_output(outputs, FIELDS))
        except CollectorFailure:
            self._add_xids(outputs, samples)
            raise
        if "index" not in fields:
            raise CollectorFailure("nvidia-smi --help-query-gpu lists no known fields")
        return fields

    def _sections(self, fields: Mapping[str, str]) -> list[Section]:
        mig = [gpu.INSTANCES_SECTION] if self._mig_enabled else []
        # The kernel log first: it can be read, and explains the fault, when the driver hangs.
        return [gpu.XIDS_SECTION, gpu.build_nvidia_smi_section(fields.values()), gpu.PROCESSES_SECTION, *mig]

    def _add(self, outputs: Mapping[str, SectionOutput], fields: list[str], samples: CollectorSamples) -> None:
        query = outputs.get(QUERY)
        if query is None or query.status in (NOT_READ, *ENDED_BY_TIMEOUT):
            self._add_xids(outputs, samples)
            require_output(outputs, QUERY)
        assert query is not None  # noqa: S101 - require_output() has raised otherwise
        answer = gpu.parse_query(query.text, fields)
        self._remember(answer)  # before _add_xids(), which looks up indexes by PCI address
        self._add_xids(outputs, samples)
        for card in answer.gpus:
            self._add_card(card, samples)
        responding = {card.values["index"] for card in answer.gpus}
        lost = {index or self._index_of.get(address, address) for address, index in answer.lost}
        for index in sorted(lost - responding):
            samples.add("gpu_healthy", 0, gpu=index)
        samples.add("gpu_count", len(answer.gpus) if answer.gpus or answer.lost else None)
        uuids = {card.values["uuid"]: card.values["index"] for card in answer.gpus if "uuid" in card.values}
        self._add_processes(outputs, uuids, samples)
        if query.status not in gpu.GOOD_STATUSES:
            raise CollectorFailure(f"nvidia-smi: exit status {query.status}: {answer.messages or query.last_line}")
        if not answer.gpus:
            raise CollectorFailure(f"nvidia-smi reports no GPU: {query.last_line}")
        require_output(outputs, gpu.PROCESSES_SECTION.name)

    def _add_card(self, card: gpu.Gpu, samples: CollectorSamples) -> None:
        index, values = card.values["index"], card.values
        samples.add(
            "gpu_info", 1, gpu=index, uuid=values.get("uuid", ""), name=values.get("name", ""),
            driver_version=values.get("driver", ""), pci_bus_id=values.get("pci", ""),
        )  # fmt: skip
        samples.add("gpu_healthy", int(not card.faults), gpu=index)
        for name, metric, factor, labels in _NUMBERS:
            number = card.number(name)
            samples.add(metric, None if number is None else number * factor, gpu=index, **labels)
        pstate = values.get("pstate", "").removeprefix("P")
        samples.add("gpu_performance_state", float(pstate) if is_count(pstate) else None, gpu=index)
        for name, text in values.items():
            group, _, reason = name.partition("_")
            if group == "throttle":
                samples.add("gpu_throttle_active", _BOOLEANS.get(text), gpu=index, reason=reason)
            elif group == "throttled" and (number := card.number(name)) is not None:
                samples.add("gpu_throttle_seconds_total", number * MICROSECOND, gpu=index, reason=reason)
        for metric, prefix in (("gpu_remapped_rows", "remapped"), ("gpu_retired_pages", "retired")):
            for kind in ("pending", "failure"):
                samples.add(metric, _BOOLEANS.get(values.get(f"{prefix}_{kind}", "")), gpu=index, kind=kind)
        if "recovery" in values:
            samples.add("gpu_recovery_needed", int(values["recovery"] != "None"), gpu=index, action=values["recovery"])

    def _add_processes(
        self, outputs: Mapping[str, SectionOutput], uuids: Mapping[str, str], samples: CollectorSamples
    ) -> None:
        processes = outputs.get(gpu.PROCESSES_SECTION.name)
        memory = gpu.parse_memory_by_gpu_and_container(processes.text) if processes is not None else {}
        for uuid, containers in memory.items():
            for container, size in sorted(containers.items()):
                samples.add("gpu_process_memory_bytes", size, gpu=uuids.get(uuid, uuid), container=container)
        instance_list = outputs.get(gpu.INSTANCES_SECTION.name)
        for uuid, instances in (gpu.parse_instances(instance_list.text) if instance_list is not None else {}).items():
            for described in instances:
                profile, _, instance = described.partition(" ")
                index = uuids.get(uuid, uuid)
                samples.add("gpu_mig_instance_info", 1, gpu=index, instance=instance, profile=profile)

    def _add_xids(self, outputs: Mapping[str, SectionOutput], samples: CollectorSamples) -> None:
        kernel_log = outputs.get(gpu.XIDS_SECTION.name)
        if kernel_log is not None:
            self._remember_xids(kernel_log.text)
        index_of = {pci.partition(".")[0]: index for pci, index in self._index_of.items()}
        for (address, xid), at in sorted(self._xids.items()):
            # An address is the name of a lost GPU.
            index = index_of.get(address, f"{address}.0")
            samples.add("gpu_xid_last_timestamp_seconds", at, gpu=index, xid=xid)

    def _remember_xids(self, kernel_log: str) -> None:
        """Keep the XIDs since boot: the kernel log has a limited size."""
        booted = gpu.parse_boot_time(kernel_log)
        kept = {key: at for key, at in self._xids.items() if at >= booted - XID_JITTER}
        for key, at in gpu.parse_last_xid_times(kernel_log).items():
            kept[key] = kept[key] if abs(kept.get(key, 0.0) - at) <= XID_JITTER else at
        newest = sorted(kept.items(), key=lambda item: item[1])[-gpu.XID_LIMIT :]
        self._xids = dict(newest)

    def _remember(self, answer: gpu.GpuQueryResult) -> None:
        cards = [card.values for card in answer.gpus if "pci" in card.values]
        address_of = {values["index"]: gpu.normalize_pci_address(values["pci"]) for values in cards}
        known = [(address, index) for address, index in self._index_of.items() if index not in address_of]
        known += [(address, index) for index, address in address_of.items()]
        self._index_of = dict(known[-2 * gpu.GPU_LIMIT :])  # limited, as a host may report other GPUs each time
        self._mig_enabled = any(card.values.get("mig") == "Enabled" for card in answer.gpus)
        driver = next((card.values["driver"] for card in answer.gpus if "driver" in card.values), self._driver)
        if driver != self._driver and self._driver:
            self._fields = None  # another driver supports other fields
        self._driver = driver


GPU = CollectorKind(GpuCollectorOptions, FAMILIES, GpuCollector)

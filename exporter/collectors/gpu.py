"""The `gpu` collector: what nvidia-smi tells of every card, and the kernel of their faults."""

from collections.abc import Mapping

from exporter.collectors import Kind
from exporter.collectors.collecting import CollectFailure, Collecting, Every, Read, good
from exporter.exposition.page import Family
from exporter.exposition.samples import Samples
from fleet.host import gpu
from fleet.host.sections import NOT_READ, Section, SectionOutput
from fleet.shells import ENDED_BY_TIMEOUT

MIB, MHZ, PERCENT, MICROSECOND = 2.0**20, 1e6, 0.01, 1e-6
FIELDS, QUERY = "fields", "query"

FAMILIES = (
    Family("gpu_info", "gauge", "A card that answered; always 1."),
    Family("gpu_count", "gauge", "Cards that answered."),
    Family("gpu_healthy", "gauge", "Whether a card answered without a fault."),
    Family("gpu_mig_instance_info", "gauge", "A MIG instance of a card; always 1."),
    Family("gpu_utilization_ratio", "gauge", "Share of the time in which a kernel ran."),
    Family("gpu_memory_utilization_ratio", "gauge", "Share of the time in which memory was read or written."),
    Family("gpu_memory_total_bytes", "gauge", "Memory of the card."),
    Family("gpu_memory_used_bytes", "gauge", "Memory that is used."),
    Family("gpu_memory_reserved_bytes", "gauge", "Memory that driver and firmware keep."),
    Family("gpu_memory_free_bytes", "gauge", "Memory that is free."),
    Family("gpu_temperature_celsius", "gauge", "Temperature by sensor."),
    Family("gpu_power_watts", "gauge", "Power that is drawn."),
    Family("gpu_power_limit_watts", "gauge", "Power that may be drawn."),
    Family("gpu_clock_hertz", "gauge", "Clocks as they are."),
    Family("gpu_fan_speed_ratio", "gauge", "Speed of the fan that is asked for."),
    Family("gpu_performance_state", "gauge", "0 is the fastest."),
    Family("gpu_throttle_active", "gauge", "Whether a reason holds the clocks down."),
    Family("gpu_throttle_seconds_total", "counter", "How long a reason has held the clocks down."),
    Family("gpu_ecc_errors_total", "counter", "ECC errors: volatile since the driver was loaded, aggregate ever."),
    Family("gpu_remapped_rows", "gauge", "Rows of memory remapped; pending and failure are 0 or 1."),
    Family("gpu_retired_pages", "gauge", "Pages of memory retired; pending is 0 or 1."),
    Family("gpu_recovery_needed", "gauge", "Whether the driver asks for an action; 1 with the action."),
    Family("gpu_process_memory_bytes", "gauge", "Memory that processes hold, by container; host where in none."),
    Family("gpu_xid_last_timestamp_seconds", "gauge", "When the kernel log told of an XID last."),
)

# What is a number times a unit: field, metric, unit, more labels.
_MEASURED: tuple[tuple[str, str, float, Mapping[str, str]], ...] = (
    ("utilization", "gpu_utilization_ratio", PERCENT, {}),
    ("memory_utilization", "gpu_memory_utilization_ratio", PERCENT, {}),
    *((f"memory_{name}", f"gpu_memory_{name}_bytes", MIB, {}) for name in ("total", "used", "reserved", "free")),
    ("temperature", "gpu_temperature_celsius", 1.0, {"sensor": "gpu"}),
    ("memory_temperature", "gpu_temperature_celsius", 1.0, {"sensor": "memory"}),
    ("power", "gpu_power_watts", 1.0, {}),
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
_YES = {"Yes": 1, "Active": 1, "1": 1, "No": 0, "Not Active": 0, "0": 0}


class Gpu(Collecting[Every]):
    """Keeps which fields the driver offers, where each card is, and whether cards are split."""

    _fields: Mapping[str, str] | None = None
    _driver = ""
    _split = False

    def __init__(self, options: Every, host: str) -> None:
        super().__init__(options, host)
        self._index_of: dict[str, str] = {}  # by PCI address

    def sections(self) -> list[Section]:
        return [
            gpu.HELP_SECTION,
            gpu.build_query_section(()),
            gpu.PROCESSES_SECTION,
            gpu.XIDS_SECTION,
            gpu.INSTANCES_SECTION,
        ]

    async def collect(self, read: Read, samples: Samples) -> None:
        if self._fields is None:
            self._fields = await self._offered(read, samples)
        outputs = await read(self._sections(self._fields))
        queried = outputs.get(QUERY)
        if queried is not None and "is not a valid field" in queried.text:
            # Another driver than the one that was asked for its fields.
            self._fields = await self._offered(read, samples)
            outputs = await read(self._sections(self._fields))
        self._add(outputs, list(self._fields), samples)

    async def _offered(self, read: Read, samples: Samples) -> Mapping[str, str]:
        # Where the driver hangs already, the kernel's log is all that there is to be had.
        outputs = await read((gpu.XIDS_SECTION, gpu.HELP_SECTION))
        try:
            found = gpu.map_supported_fields(good(outputs, FIELDS))
        except CollectFailure:
            self._add_xids(outputs, samples)
            raise
        if "index" not in found:
            raise CollectFailure("nvidia-smi --help-query-gpu names none of the fields that we know")
        return found

    def _sections(self, fields: Mapping[str, str]) -> list[Section]:
        more = [gpu.INSTANCES_SECTION] if self._split else []
        # The kernel's log first: it answers where a driver hangs, and then it is what one wants to know.
        return [gpu.XIDS_SECTION, gpu.build_query_section(fields.values()), gpu.PROCESSES_SECTION, *more]

    def _add(self, outputs: Mapping[str, SectionOutput], fields: list[str], samples: Samples) -> None:
        queried = outputs.get(QUERY)
        if queried is None or queried.status in (NOT_READ, *ENDED_BY_TIMEOUT):
            self._add_xids(outputs, samples)
            good(outputs, QUERY)
        assert queried is not None  # noqa: S101 - good() has seen to that
        answer = gpu.parse_query(queried.text, fields)
        self._remember(answer)  # first: by what was remembered, XIDs find their card
        self._add_xids(outputs, samples)
        for card in answer.gpus:
            self._add_card(card, samples)
        alive = {card.values["index"] for card in answer.gpus}
        lost = {index or self._index_of.get(address, address) for address, index in answer.lost}
        for index in sorted(lost - alive):
            samples.add("gpu_healthy", 0, gpu=index)
        samples.add("gpu_count", len(answer.gpus) if answer.gpus or answer.lost else None)
        uuids = {card.values["uuid"]: card.values["index"] for card in answer.gpus if "uuid" in card.values}
        self._add_processes(outputs, uuids, samples)
        if queried.status not in gpu.GOOD_STATUSES:
            raise CollectFailure(f"nvidia-smi: exit {queried.status}: {answer.messages or queried.last_line}")
        if not answer.gpus:
            raise CollectFailure(f"nvidia-smi told of no card: {queried.last_line}")
        good(outputs, gpu.PROCESSES_SECTION.name)

    def _add_card(self, card: gpu.Gpu, samples: Samples) -> None:
        index, values = card.values["index"], card.values
        samples.add(
            "gpu_info", 1, gpu=index, uuid=values.get("uuid", ""), name=values.get("name", ""),
            driver_version=values.get("driver", ""), pci_bus_id=values.get("pci", ""),
        )  # fmt: skip
        samples.add("gpu_healthy", int(not card.faults), gpu=index)
        for name, metric, unit, more in _MEASURED:
            number = card.number(name)
            samples.add(metric, None if number is None else number * unit, gpu=index, **more)
        pstate = values.get("pstate", "").removeprefix("P")
        samples.add("gpu_performance_state", float(pstate) if pstate.isdigit() else None, gpu=index)
        for name, text in values.items():
            group, _, reason = name.partition("_")
            if group == "throttle":
                samples.add("gpu_throttle_active", _YES.get(text), gpu=index, reason=reason)
            elif group == "throttled" and (number := card.number(name)) is not None:
                samples.add("gpu_throttle_seconds_total", number * MICROSECOND, gpu=index, reason=reason)
        for metric, of in (("gpu_remapped_rows", "remapped"), ("gpu_retired_pages", "retired")):
            for kind in ("pending", "failure"):
                samples.add(metric, _YES.get(values.get(f"{of}_{kind}", "")), gpu=index, kind=kind)
        if "recovery" in values:
            samples.add("gpu_recovery_needed", int(values["recovery"] != "None"), gpu=index, action=values["recovery"])

    def _add_processes(self, outputs: Mapping[str, SectionOutput], uuids: Mapping[str, str], samples: Samples) -> None:
        processes = outputs.get(gpu.PROCESSES_SECTION.name)
        held = gpu.parse_memory_by_container(processes.text) if processes is not None else {}
        for uuid, containers in held.items():
            for container, size in sorted(containers.items()):
                samples.add("gpu_process_memory_bytes", size, gpu=uuids.get(uuid, uuid), container=container)
        listed = outputs.get(gpu.INSTANCES_SECTION.name)
        for uuid, instances in (gpu.parse_instances(listed.text) if listed is not None else {}).items():
            for each in instances:
                profile, _, instance = each.partition(" ")
                index = uuids.get(uuid, uuid)
                samples.add("gpu_mig_instance_info", 1, gpu=index, instance=instance, profile=profile)

    def _add_xids(self, outputs: Mapping[str, SectionOutput], samples: Samples) -> None:
        told = outputs.get(gpu.XIDS_SECTION.name)
        for (address, xid), at in sorted((gpu.parse_xids(told.text) if told is not None else {}).items()):
            known = (index for pci, index in self._index_of.items() if pci.startswith(address))
            index = next(known, f"{address}.0")  # as a lost card is called
            samples.add("gpu_xid_last_timestamp_seconds", at, gpu=index, xid=xid)

    def _remember(self, answer: gpu.GpuQueryResult) -> None:
        for card in answer.gpus:
            if "pci" in card.values:
                index = card.values["index"]
                others = {address: known for address, known in self._index_of.items() if known != index}
                self._index_of = {**others, gpu.normalize_pci_address(card.values["pci"]): index}
        self._index_of = dict(
            list(self._index_of.items())[-2 * gpu.GPU_LIMIT :]
        )  # a host may name other cards each time
        self._split = any(card.values.get("mig") == "Enabled" for card in answer.gpus)
        driver = next((card.values["driver"] for card in answer.gpus if "driver" in card.values), self._driver)
        if driver != self._driver and self._driver:
            self._fields = None  # another driver has other fields
        self._driver = driver


GPU = Kind(Every, FAMILIES, Gpu)

"""What the machines of a cluster.yaml need of an account: vCPUs within its quotas, and dollars an hour."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from dogvae.cluster.aws import Account, Refused
from dogvae.cluster.cluster_file import ClusterFile, Machines

# Codes of EC2's quotas in vCPUs, on demand and spot, by the letters that an instance type begins with.
QUOTAS = {
    r"(g|gr|vt)\d": ("L-DB2E81BA", "L-3819A6DF"),
    r"p\d": ("L-417A185B", "L-7212CCBC"),
    r"(a|c|d|h|i|im|is|m|r|t|z)\d": ("L-1216C47A", "L-34B43A08"),
}


class Finding(NamedTuple):
    """The result of one check: what was looked at, whether it is as it must be, and what is wrong and what to do."""

    what: str
    ok: bool
    text: str


def quotas(account: Account, machines: list[Machines]) -> list[Finding]:
    """For each quota, whether it is large enough for all these machines at once."""
    kinds = sorted({m.kind for m in machines})
    try:
        types = account.ask("ec2", "describe_instance_types", InstanceTypes=kinds)["InstanceTypes"]
    except Refused as error:
        return [Finding("instance types", False, f"{error}; another region or another InstanceType may do")]
    vcpus = {t["InstanceType"]: t["VCpuInfo"]["DefaultVCpus"] for t in types}
    groups: dict[str, list[Machines]] = {}
    for m in machines:
        code = next((codes[m.spot] for family, codes in QUOTAS.items() if re.match(family, m.kind)), "")
        groups.setdefault(code, []).append(m)
    return [_quota(account, code, group, vcpus) for code, group in groups.items()]


def _quota(account: Account, code: str, group: list[Machines], vcpus: dict[str, int]) -> Finding:
    need = sum(m.count * vcpus[m.kind] for m in group)
    named = ", ".join(f"{m.count} {m.kind}" for m in group)
    what, asked = f"quota for {named}", f"{need} vCPUs{' of spot machines' if group[0].spot else ''}"
    if not code:
        return Finding(what, True, f"{asked}; not checked: look for this family in the Service Quotas console")
    try:
        quota = account.ask("service-quotas", "get_service_quota", ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
    except Refused as error:
        return Finding(what, False, f"{asked}; AWS does not say the quota {code}: {error}")
    if quota >= need:
        return Finding(what, True, f"{need} of {quota:g} vCPUs")
    remedy = (
        f"aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {code} "
        f"--desired-value {need} --region {account.region}"
    )
    return Finding(what, False, f"needs {asked}, the quota is {quota:g}: type `{remedy}`; the answer can take days")


def costs(account: Account, file: ClusterFile) -> list[str]:
    """A line for each node type with its price an hour on demand, and one for all machines together."""
    lines, total, known, sources = [], 0.0, True, dict[str, None]()  # a dict keeps the order of its keys
    idle = file.config.get("idle_timeout_minutes", 5)
    for m in file.machines():
        price, source = _price(account, file, m.kind)
        sources[source] = None
        total, known = total + m.count * (price or 0), known and price is not None
        when = "from `ray up` to `ray down`" if m.head else f"while it is up; it ends after {idle} idle minutes"
        spot = "less than this as a spot machine, " if m.spot else ""
        each = "price unknown" if price is None else f"${price:.3f} an hour each"
        lines.append(f"{m.name}, at most {m.count} {m.kind}: {each}, {spot}{when}")
    together = f"at most ${total:.2f} an hour, without disks, storage and traffic" if known else "price unknown"
    return [*lines, f"all together: {together} ({'; '.join(sources)})"]


def _price(account: Account, file: ClusterFile, kind: str) -> tuple[float | None, str]:
    """US dollars an hour, and where that stands."""
    wanted = {"instanceType": kind, "regionCode": account.region, "operatingSystem": "Linux", "tenancy": "Shared"}
    wanted |= {"preInstalledSw": "NA", "capacitystatus": "Used"}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    try:
        found = account.ask("pricing", "get_products", ServiceCode="AmazonEC2", Filters=filters)["PriceList"]
    except Refused:
        found = []
    for product in map(json.loads, found):
        for term in product["terms"].get("OnDemand", {}).values():
            for dimension in term["priceDimensions"].values():
                if (price := float(dimension["pricePerUnit"]["USD"])) > 0:  # 0: hours that were paid in advance
                    return price, "by AWS's price list"
    noted = file.noted_price(kind)
    if noted:
        return noted[0], f"noted in {file.path.name}: {noted[1]}; AWS's price list does not answer"
    return None, f"price of {kind} unknown: see https://aws.amazon.com/ec2/pricing/on-demand"

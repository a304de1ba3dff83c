"""`python aws_server.py -p PORT`: moto's server, and what the tests need and moto lacks.

Added are the deep learning image that docs/aws-account.yaml names, and quotas of vCPUs: eu-central-1 has none for GPU
machines. moto has no price list, checks neither permissions nor credentials, and makes a stack at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from moto.ec2.models import ec2_backends
from moto.server import main
from moto.servicequotas.models import ServiceQuotasBackend
from moto.ssm.models import Parameter, ParameterDict

TEMPLATE = (Path(__file__).parents[2] / "docs/aws-account.yaml").read_text()
PARAMETERS = yaml.safe_load(TEMPLATE[TEMPLATE.index("Parameters:") : TEMPLATE.index("Resources:")])["Parameters"]
IMAGE = PARAMETERS["Image"]["Default"]
load = ParameterDict._check_loading_status


def load_with_image(self: Any, key: str) -> None:
    load(self, key)
    if key == IMAGE and not dict.get(self, IMAGE):
        newest = next(iter(ec2_backends[self.account_id][self.region_name].amis))
        self[IMAGE] = [
            Parameter(
                account_id=self.account_id, name=IMAGE, value=newest, parameter_type="String", description=None,
                allowed_pattern=None, keyid=None, last_modified_date=0, version=1, data_type="text",
            )
        ]  # fmt: skip


def quota(self: Any, service_code: str, quota_code: str) -> dict[str, Any]:
    vcpus = {"L-DB2E81BA": 0 if self.region_name == "eu-central-1" else 96, "L-1216C47A": 32}
    return {"QuotaCode": quota_code, "Value": float(vcpus[quota_code])}


ParameterDict._check_loading_status = load_with_image
ServiceQuotasBackend.get_service_quota = quota
main(sys.argv[1:])

"""An account on AWS: requests to it, and their errors in one line. boto3 is imported only here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from dogvae.errors import UsageError, did_you_mean

DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403"}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
UNKNOWN = {"AuthFailure", "InvalidClientTokenId", "InvalidAccessKeyId", "SignatureDoesNotMatch", "OptInRequired"}
UNKNOWN |= {"UnrecognizedClientException", "IncompleteSignature"}
# Permissions whose names differ from those of the requests.
PERMISSIONS = {"s3:HeadBucket": "s3:ListBucket", "service-quotas:GetServiceQuota": "servicequotas:GetServiceQuota"}


class Refused(UsageError):
    """AWS refused a request. `code` is AWS's word for the reason; the message may say what to do."""

    def __init__(self, message: str, code: str, has_remedy: bool = False) -> None:
        super().__init__(" ".join(message.split()))
        self.code, self.has_remedy = code, has_remedy


class Account:
    """The account of this machine's credentials, in one region.

    Raises UsageError with one line if boto3 or credentials are missing, or if AWS does not accept them.
    """

    def __init__(self, region: str, named_by: str) -> None:
        if find_spec("boto3") is None:
            raise UsageError("`dogvae cloud` needs boto3: pip install 'dogvae[cloud]'")
        import boto3
        from botocore.exceptions import BotoCoreError

        try:
            self._session = boto3.Session(region_name=region)
        except BotoCoreError as error:
            raise UsageError(f"{error}; see ~/.aws/config and AWS_PROFILE") from error
        partitions = self._session.get_available_partitions()
        known = [name for partition in partitions for name in self._session.get_available_regions("ec2", partition)]
        if region not in known:
            raise UsageError(f"{named_by}: AWS has no region {region}{did_you_mean(region, known)}")
        self.region = region
        identity = self.ask("sts", "get_caller_identity")
        self.id, self.user = identity["Account"], identity["Arn"]

    def ask(self, service: str, operation: str, **parameters: Any) -> Any:
        """The answer to a request. Raises Refused, with one line that says what to do."""
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        region = "us-east-1" if service == "pricing" else self.region  # the price list is kept there for all regions
        config = Config(connect_timeout=10, read_timeout=30, retries={"total_max_attempts": 3, "mode": "standard"})
        try:
            client = self._session.client(service, region_name=region, config=config)
            return getattr(client, operation)(**parameters)
        except ClientError as error:
            raise self._explain(service, error) from error
        except NoCredentialsError as error:
            remedy = "type `aws configure`, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise Refused(f"there are no AWS credentials on this machine: {remedy}", "NoCredentials", True) from error
        except BotoCoreError as error:
            raise Refused(f"AWS: {error}; see ~/.aws/config and the network", type(error).__name__, True) from error

    def _explain(self, service: str, error: Any) -> Refused:
        code, message = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
        request = f"{service}:{error.operation_name}"
        if code in DENIED:
            _, _, denied = message.partition("not authorized to perform: ")
            action = denied.split()[0] if denied else PERMISSIONS.get(request, request)
            text = f"these credentials lack the permission {action}: ask the administrator of the account for it"
        elif code in EXPIRED:
            text = "the AWS credentials have expired: sign in again (`aws sso login`), or make new keys"
        elif code in UNKNOWN:
            text = (
                f"AWS does not accept these credentials in {self.region} ({code}): see `aws sts get-caller-identity`, "
                "and that the account uses this region"
            )
        else:
            return Refused(f"{request}: {message} ({code})", code)
        return Refused(text, code, True)

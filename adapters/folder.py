"""The files of an adapter folder, by name, and how large each may be."""

from collections.abc import Mapping

from adapters.limits import MAX_ADAPTER_BYTES, MAX_JSON_BYTES, MAX_TEMPLATE_BYTES, MAX_TEXT_BYTES

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
CONFIG_FILE = "adapter_config.json"
PROVENANCE_FILE = "rora.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# Every file that belongs to an adapter; others in its folder are never opened or copied.
MAX_FILE_BYTES: Mapping[str, int] = {
    WEIGHTS_FILE: MAX_ADAPTER_BYTES,
    CONFIG_FILE: MAX_JSON_BYTES,
    PROVENANCE_FILE: MAX_JSON_BYTES,
    CHAT_TEMPLATE_FILE: MAX_TEMPLATE_BYTES,
    "README.md": MAX_TEXT_BYTES,
    "report.html": MAX_TEXT_BYTES,
}

"""Records the parts of vLLM wheels' interface that Antefix's tier uses: python record_vllm_interface.py WHEEL...

The script reads the wheel's source and runs none of it. The result, vllm_interface.json, holds only names: classes,
methods with their parameters, fields, members. `test_vllm_interface.py` compares the tier and the other tests' stand-in
with this file.
"""

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

RECORD = Path(__file__).with_name("vllm_interface.json")
CLASSES = {
    "vllm/v1/kv_offload/base.py": [
        "LookupResult",
        "Medium",
        "Locality",
        "ReqContext",
        "RequestOffloadingContext",
        "OffloadingEvent",
        "OffloadingMetricMetadata",
        "OffloadingCounterMetadata",
        "OffloadingKVEventsConfig",
        "OffloadingManager",
        "OffloadingSpec",
    ],
    "vllm/v1/kv_offload/config.py": [
        "OffloadingGroupConfig",
        "OffloadingModelConfig",
        "OffloadingCacheConfig",
        "OffloadingParallelConfig",
        "OffloadingConfig",
    ],
    "vllm/v1/kv_offload/tiering/base.py": ["SecondaryTierManager", "TransferJob", "JobResult"],
    "vllm/v1/kv_offload/tiering/spec.py": ["TieringOffloadingSpec"],
    "vllm/v1/kv_offload/tiering/manager.py": ["TieringOffloadingManager"],
    "vllm/distributed/kv_transfer/kv_connector/v1/offloading/metrics.py": ["OffloadingConnectorStats"],
}


def main(wheels):
    record = {}
    for wheel in wheels:
        version = re.search(r"-(\d+\.\d+)\.\d+", Path(wheel).name)[1]
        with zipfile.ZipFile(wheel) as files:
            trees = {path: ast.parse(files.read(path)) for path in CLASSES}
        record[version] = {
            name: described(node)
            for path, names in CLASSES.items()
            for node in trees[path].body
            if isinstance(node, ast.ClassDef) and (name := node.name) in names
        }
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def described(node):
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return {
        "fields": [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)],
        "members": [item.targets[0].id for item in node.body if isinstance(item, ast.Assign)],
        "methods": {item.name: [each.arg for each in (*item.args.args, *item.args.kwonlyargs)] for item in methods},
        "abstract": sorted(
            item.name for item in methods if any("abstractmethod" in ast.unparse(each) for each in item.decorator_list)
        ),
        "attributes": sorted(
            {
                target.attr
                for each in ast.walk(node)
                if isinstance(each, ast.Assign | ast.AnnAssign)
                for target in (each.targets if isinstance(each, ast.Assign) else [each.target])
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
            }
        ),
    }


if __name__ == "__main__":
    main(sys.argv[1:])

"""Raw sources that are written and prepared shards that are read."""

import json
import tarfile

from PIL import Image


def entry_about(image="0.png", question="<image>\nWhat?", answer="red", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "a", "image": image, "conversations": turns, **more}


def write_source(path, entries, images=("0.png",)):
    path.mkdir(parents=True, exist_ok=True)
    for name in images:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (255, 0, 0)).save(path / name)
    (path / "data.json").write_text(json.dumps(entries))
    return path


def members_of(wds):
    found = {}
    for shard in sorted(wds.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found

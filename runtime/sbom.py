"""What a bundle was made of and by, as a bill of materials that scanners of supply chains read.

Source: OWASP CycloneDX 1.6, JSON (ECMA-424).
"""

from __future__ import annotations

import uuid
from typing import Any

from engineworks import __version__
from engineworks.runtime.bundle import Bundle

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/engineworks-bundle")


def describe(bundle: Bundle) -> dict[str, Any]:
    """The bill of a verified bundle: the same for the same bundle.

    Its files with their hashes are parts of the model; the packages of its provenance made it.
    """
    manifest = bundle.manifest
    model = {
        "type": "machine-learning-model",
        "bom-ref": "bundle",
        "name": f"engineworks bundle of {manifest.system}",
        "version": manifest.digest[:12],
        "hashes": [{"alg": "SHA-256", "content": manifest.digest}],
    }
    parts: list[dict[str, Any]] = [
        {
            "type": "file",
            "bom-ref": f"file/{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
        }
        for name, entry in sorted(manifest.files.items())
    ]
    packages: list[dict[str, Any]] = [
        {
            "type": "library",
            "bom-ref": f"package/{name}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name.lower()}@{version}",
        }
        for name, version in sorted(_versions(manifest.provenance).items())
    ]
    names = [str(part["bom-ref"]) for part in (*parts, *packages)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, manifest.digest)}",
        "version": 1,
        "metadata": {
            "component": model,
            "tools": {
                "components": [
                    {"type": "application", "name": "engineworks", "version": __version__}
                ]
            },
        },
        "components": [*parts, *packages],
        "dependencies": [{"ref": "bundle", "dependsOn": names}],
    }


def _versions(provenance: dict[str, Any]) -> dict[str, str]:
    """Packages that made it, of all stages."""
    found = provenance.get("versions")
    if not isinstance(found, dict):
        return {}
    return {name: str(version) for name, version in found.items()}

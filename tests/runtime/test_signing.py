"""A bundle that its maker has signed, and what becomes of the signature."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from engineworks.cli import main
from engineworks.runtime.bundle import SIGNATURE_NAME, Bundle, read, set_threshold
from engineworks.runtime.errors import BundleError, EngineworksError, InputError
from engineworks.runtime.sbom import describe
from engineworks.runtime.signing import check_signature, make_keys, sign
from engineworks.runtime.testing import write_tiny_backbone_bundle, write_tiny_stripe_bundle


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_stripe_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def made(original: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(original.root, tmp_path / "bundle")
    return read(tmp_path / "bundle")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    make_keys(tmp_path / "key", tmp_path / "key.pub")
    return tmp_path / "key", tmp_path / "key.pub"


class TestASignedBundle:
    def test_reads_as_before_and_is_its_makers(self, made: Bundle, keys: tuple[Path, Path]) -> None:
        sign(made, keys[0])
        assert read(made.root) == made
        assert check_signature(read(made.root), [keys[1]])

    def test_may_be_of_any_of_several(
        self, made: Bundle, keys: tuple[Path, Path], tmp_path: Path
    ) -> None:
        make_keys(tmp_path / "b", tmp_path / "b.pub")
        sign(made, tmp_path / "b")
        assert check_signature(made, [keys[1], tmp_path / "b.pub"])
        with pytest.raises(BundleError, match="not signed by"):
            check_signature(made, [keys[1]])

    def test_that_is_changed_and_sealed_again_is_refused(
        self, made: Bundle, keys: tuple[Path, Path]
    ) -> None:
        sign(made, keys[0])
        set_threshold(made, "candidate", 0.9)
        with pytest.raises(BundleError, match="changed"):
            check_signature(read(made.root), [keys[1]])
        sign(read(made.root), keys[0])
        assert check_signature(read(made.root), [keys[1]])

    def test_s_signature_is_none_of_another(
        self, made: Bundle, keys: tuple[Path, Path], tmp_path: Path
    ) -> None:
        sign(made, keys[0])
        other = write_tiny_backbone_bundle(tmp_path / "other")
        shutil.copy(made.root / SIGNATURE_NAME, other.root)
        with pytest.raises(BundleError, match="not signed by"):
            check_signature(read(other.root), [keys[1]])

    @pytest.mark.parametrize(
        "text",
        ["", "{}", "[]", "x" * 100_000, '{"algorithm": "none", "public_key": "", "signature": ""}'],
    )
    def test_of_nonsense_is_refused(self, made: Bundle, keys: tuple[Path, Path], text: str) -> None:
        (made.root / SIGNATURE_NAME).write_text(text)
        with pytest.raises(BundleError, match="no signature"):
            check_signature(made, [keys[1]])

    @pytest.mark.parametrize("length", [0, 1, 63, 64, 65])
    def test_of_another_length_is_refused(
        self, made: Bundle, keys: tuple[Path, Path], length: int
    ) -> None:
        sign(made, keys[0])
        content = json.loads((made.root / SIGNATURE_NAME).read_text())
        import base64

        content["signature"] = base64.b64encode(bytes(length)).decode() or "AA=="
        (made.root / SIGNATURE_NAME).write_text(json.dumps(content))
        with pytest.raises(BundleError, match="not signed by"):
            check_signature(made, [keys[1]])

    def test_that_is_not_is_refused(self, made: Bundle, keys: tuple[Path, Path]) -> None:
        with pytest.raises(BundleError, match="is not signed"):
            check_signature(made, [keys[1]])


class TestAKey:
    def test_is_its_owners_alone_and_never_replaced(self, keys: tuple[Path, Path]) -> None:
        assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600
        with pytest.raises(InputError, match="exists"):
            make_keys(*keys)

    def test_may_be_openssh_s_or_encrypted(self, made: Bundle, tmp_path: Path) -> None:
        key = ed25519.Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
        (tmp_path / "pub").write_bytes(public)
        plain, locked = form.NoEncryption(), form.BestAvailableEncryption(b"word")
        for kind, encryption in (
            (form.PrivateFormat.OpenSSH, plain),
            (form.PrivateFormat.PKCS8, locked),
        ):
            secret = key.private_bytes(form.Encoding.PEM, kind, encryption)
            (tmp_path / "key").write_bytes(secret)
            sign(made, tmp_path / "key", password=lambda: "word")
            assert check_signature(made, [tmp_path / "pub"])
        with pytest.raises(InputError, match="private key"):
            sign(made, tmp_path / "key", password=lambda: "another")

    def test_of_another_kind_is_refused(self, made: Bundle, tmp_path: Path) -> None:
        key = rsa.generate_private_key(65537, 2048)
        (tmp_path / "rsa").write_bytes(
            key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        )
        with pytest.raises(InputError, match="no Ed25519"):
            sign(made, tmp_path / "rsa")

    @pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN PUBLIC KEY-----\nAAAA\n"])
    def test_that_is_none_is_refused(
        self, made: Bundle, keys: tuple[Path, Path], tmp_path: Path, content: bytes
    ) -> None:
        sign(made, keys[0])
        (tmp_path / "bad").write_bytes(content)
        for use in (
            lambda: sign(made, tmp_path / "bad"),
            lambda: check_signature(made, [tmp_path / "bad"]),
            lambda: check_signature(made, [keys[0]]),  # the private one by mistake
        ):
            with pytest.raises(EngineworksError):
                use()

    @pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
    def test_of_openssl_fits(self, made: Bundle, tmp_path: Path) -> None:
        """An independent maker of keys, and an independent judge of the signature."""
        private, public = tmp_path / "k.pem", tmp_path / "k.pub"
        make = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(private)]
        subprocess.run(make, check=True, capture_output=True)
        show = ["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)]
        subprocess.run(show, check=True, capture_output=True)
        sign(made, private)
        assert check_signature(made, [public])


class TestTheCommands:
    def test_sign_verify_and_refuse(self, made: Bundle, tmp_path: Path) -> None:
        def run(*words: object) -> tuple[int, str]:
            done = CliRunner().invoke(main, [str(word) for word in words])
            return done.exit_code, done.output

        assert run("bundle", "keygen", tmp_path / "k")[0] == 0
        public = tmp_path / "k.pub"
        code, text = run("bundle", "verify", made.root, "--key", public)
        assert code == 1 and "is not signed" in text
        words = ("infer", made.root, "--source", tmp_path, "--out", tmp_path / "o")
        code, text = run(*words, "--require-signature", public)
        assert code == 1 and "is not signed" in text
        assert run("bundle", "sign", made.root, "--key", tmp_path / "k")[0] == 0
        assert run("bundle", "verify", made.root, "--key", public)[0] == 0
        assert run("bundle", "set-threshold", made.root, "candidate", 0.7)[0] == 0
        assert run("bundle", "verify", made.root)[0] == 0
        code, text = run("bundle", "verify", made.root, "--key", public)
        assert code == 1 and "changed" in text

    def test_tell_what_made_a_bundle(self, made: Bundle) -> None:
        done = CliRunner().invoke(main, ["bundle", "sbom", str(made.root)])
        bill = json.loads(done.output)
        assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
        assert bill == describe(made) == describe(read(made.root))
        hashes = {each["name"]: each["hashes"][0]["content"] for each in bill["components"]}
        assert hashes == {name: entry.sha256 for name, entry in made.manifest.files.items()}

    def test_list_the_packages_of_its_provenance(self, made: Bundle) -> None:
        versions = {"torch": "2.10.0", "engineworks": "1"}
        manifest = made.manifest.model_copy(update={"provenance": {"versions": versions}})
        found = describe(Bundle(made.root, manifest))["components"]
        assert {"pkg:pypi/torch@2.10.0", "pkg:pypi/engineworks@1"} <= {
            each.get("purl") for each in found
        }

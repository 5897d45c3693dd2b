"""A certificate that anybody can check without a network: what it says is signed."""
import base64, hashlib, html, json, os, re
from datetime import date
from pathlib import Path
from ..base.errors import QLoRAError
from .class_report import one_line
from .gradebook import full_name, most_of, person, points_of

# %%
def ed25519():
    "The module with the keys."
    try: from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as e:
        raise QLoRAError("certificates are signed by the package cryptography, which is missing.",
                         cure="Run pip install 'qlora_nb[course]'.") from e
    return ed25519

def make_key(path:str|Path) -> str:  # The public key, in base64
    "A new private key in a file that only its owner reads. A file that is there is never replaced."
    path, key = Path(path).expanduser(), ed25519().Ed25519PrivateKey.generate()
    try: fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise QLoRAError("there is a file here already.", str(path), "Choose another name.") from None
    except OSError as e:
        raise QLoRAError(f"the key cannot be written ({e.strerror}).", str(path)) from e
    with open(fd, "w") as f:
        f.write(json.dumps(dict(private=base64.b64encode(key.private_bytes_raw()).decode())))
    return public_key(key)

def public_key(key) -> str: return base64.b64encode(key.public_key().public_bytes_raw()).decode()

def read_key(path:str|Path):
    "The private key of `make_key`."
    path = Path(path).expanduser()
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise QLoRAError("others can read this private key.", str(path), f"Run chmod 600 {path}.")
        raw = base64.b64decode(json.loads(path.read_text())["private"], validate=True)
        return ed25519().Ed25519PrivateKey.from_private_bytes(raw)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise QLoRAError(f"this is no private key ({type(e).__name__}).", str(path),
                         "Make one with --new-key FILE.") from e

def fingerprint(public:str) -> str:  # Such as 3f2a-91c0-77de-0b14
    "A key in a form that people compare."
    text = hashlib.sha256(base64.b64decode(public)).hexdigest()
    return "-".join(text[i:i + 4] for i in range(0, 24, 4))

# %%
def canonical(data) -> bytes:
    "The one way to write `data` in bytes: keys sorted, no spaces, UTF-8."
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

def sign(data:dict, key) -> dict:
    "`data` with its signature and the public key."
    return dict(certificate=data, key=public_key(key),
                signature=base64.b64encode(key.sign(canonical(data))).decode())

# %%
def certificate_for(student, grades, roster, course, version, until, day=None) -> dict:
    "What a certificate says."
    sums, most = points_of(grades).get(student, {}), most_of(grades)
    pages = {k: dict(points=sums.get(k, (0,))[0], of=most[k]) for k in most}
    return dict(name=one_line(full_name(person(student, roster))), course=course, version=version,
                date=str(day or date.today()), supported_until=str(until) if until else None,
                pages=pages, points=sum(o["points"] for o in pages.values()), of=sum(most.values()))

# %%
def certificate_html(signed:dict) -> str:
    "A certificate to look at, with the signed data inside."
    o, e = signed["certificate"], lambda x: html.escape(str(x))
    rows = "".join(f"<tr><td>{e(k)}</td><td>{e(v['points'])} of {e(v['of'])}</td></tr>"
                   for k, v in o["pages"].items())
    until = f"<p>Supported until {e(o['supported_until'])}.</p>" if o["supported_until"] else ""
    inside = json.dumps(signed, sort_keys=True, indent=1).replace("<", "\\u003c")
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Certificate</title>
<style>:root{{color-scheme:light dark}}body{{font:17px/1.6 Georgia,serif;max-width:40em;margin:3em auto;
border:3px double;padding:2em;text-align:center}}table{{margin:auto}}td{{padding:0 1em;text-align:left}}</style>
<h1>{e(o['course'])}</h1><p>{e(o['name'])}</p><p>{e(o['points'])} of {e(o['of'])} points, version
{e(o['version'])}, {e(o['date'])}</p><table>{rows}</table>{until}
<p><small>Signed by the key {fingerprint(signed['key'])}. Check it with
<code>qlora_course verify</code>.</small></p>
<script type="application/json">{inside}</script></html>
"""

# %%
def once(pairs):
    "A dictionary whose keys stand there once."
    if len(pairs) != len(dict(pairs)): raise ValueError("a key that is there twice")
    return dict(pairs)

def read_certificate(path:Path) -> dict:
    "The signed data of a .json or .html file; a page that shows anything else is refused."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".html": return json.loads(text, object_pairs_hook=once)
    inside = re.search(r'<script type="application/json">(.*)</script>', text, re.S)
    signed = json.loads(inside[1] if inside else "", object_pairs_hook=once)
    if certificate_html(signed).split() != text.split(): raise ValueError("the page shows something else")
    return signed

# %%
def verify(path:str|Path,          # A certificate, .json or .html
           key:str|None=None,      # The public key that the course publishes, in base64
           day:date|None=None      # To compare with (None: today)
          ) -> tuple:              # What it says, and what to know about it
    "Check a certificate offline. Raises `QLoRAError` for one that is not what was signed."
    path = Path(path).expanduser()
    try:
        signed = read_certificate(path)
        data, public, signature = (signed[o] for o in ("certificate", "key", "signature"))
        ed25519().Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True)).verify(
            base64.b64decode(signature, validate=True), canonical(data))
        until = data["supported_until"] and date.fromisoformat(data["supported_until"])
    except QLoRAError: raise
    except OSError as e: raise QLoRAError(f"it cannot be read ({e.strerror}).", str(path)) from e
    except Exception as e:   # of cryptography, of JSON, of a shape that is not ours
        raise QLoRAError(f"this certificate was changed, or is none ({type(e).__name__}).", str(path),
                         "Ask for the file as it was issued.") from e
    if key and key.strip() != public:
        raise QLoRAError(f"this certificate was signed by another key ({fingerprint(public)}).",
                         str(path), "Ask the course which keys it has used.")
    notes = [] if key else [f"Signed by the key {fingerprint(public)}: compare it with the course's."]
    if until and until < (day or date.today()):
        notes.append(f"The version {data['version']} of the course was supported until {until}.")
    return data, notes

# %%
def file_name(student:str) -> str:
    "A name for a file, whatever the student is called."
    name = re.sub(r"[^\w-]", "_", student)[:60]
    return name if name == student else f"{name}-{hashlib.sha256(student.encode('utf-8', 'replace')).hexdigest()[:8]}"

def write_certificates(grades, out:Path, key, course:str, version:str,
                       until:date|None=None,   # Supported until
                       roster:dict={},
                       least:float=.5          # Share of the points that earns one
                      ) -> list:               # Of the students that got one
    "A signed .json and an .html for each student with enough points."
    got = []
    for student in points_of(grades):
        data = certificate_for(student, grades, roster, course, version, until)
        if data["points"] < least*data["of"]: continue
        signed = sign(data, key)
        where = Path(out)/file_name(student)
        where.with_suffix(".json").write_text(json.dumps(signed, sort_keys=True, indent=1), encoding="utf-8")
        where.with_suffix(".html").write_text(certificate_html(signed), encoding="utf-8")
        got.append(student)
    return got

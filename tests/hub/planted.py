"""Made-up secrets of many kinds and harmless texts that look like some, for the tests of the scan.

Tokens are drawn from seeded random characters, so that no literal one stands here. Each list has two halves: one that the
rules were developed on, and one that was written beforehand and tried when the rules were done.
"""

import base64
import html
import json
import random
import string
import urllib.parse


BASE62 = string.ascii_letters + string.digits
BASE64URL = BASE62 + "-_"


class Draw:
    """Seeded random characters."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def of(self, alphabet, length):
        return "".join(self._random.choice(alphabet) for _ in range(length))

    def alnum(self, length):
        return self.of(BASE62, length)

    def url(self, length):
        return self.of(BASE64URL, length - 1) + self.of(BASE62, 1)

    def hex(self, length):
        return self.of("0123456789abcdef", length)

    def lower(self, length):
        return self.of(string.ascii_lowercase + string.digits, length)

    def upper(self, length):
        return self.of(string.ascii_uppercase + string.digits, length)

    def letters(self, length):
        return self.of(string.ascii_letters, length)

    def digits(self, length):
        return self.of("123456789", 1) + self.of(string.digits, length - 1)

    def base64(self, length):
        return base64.b64encode(self._random.randbytes(length)).decode()

    def uuid(self):
        return "-".join(self.hex(length) for length in (8, 4, 4, 4, 12))

    def password(self):
        return self.of(string.ascii_lowercase, 4) + self.digits(2) + self.of("!#%*", 1) + self.of(BASE62, 5)

    def card(self, start, length):
        body = start + self.of(string.digits, length - len(start) - 1)
        return body + next(digit for digit in string.digits if luhn(body + digit))

    def iban(self, country, length):
        body = self.of(string.digits, length)
        number = int("".join(str(int(character, 36)) for character in body + country + "00"))
        return f"{country}{98 - number % 97:02}{body}"


def luhn(number):
    digits = [int(digit) for digit in reversed(number)]
    return sum(digits[::2] + [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]) % 10 == 0


def grouped(text, size=4, by=" "):
    return by.join(text[start : start + size] for start in range(0, len(text), size))


def full_width(text):
    return "".join(chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else character for character in text)


def jwt(draw):
    head, body = ({"alg": "HS256", "typ": "JWT"}, {"sub": draw.digits(10), "iat": 1700000000})
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (head, body))
    return ".".join((*parts, draw.url(43)))


def hub_token(draw):
    return "hf_" + draw.letters(34)


def development_secrets(seed=1):
    """Kind and text of each planted secret of the half that the rules were developed on."""
    d = Draw(seed)
    return [
        # Tokens of vendors.
        ("Hugging Face", f"token {hub_token(d)}"),
        ("OpenAI", f"sk-proj-{d.url(48)}T3BlbkFJ{d.url(48)}"),
        ("Anthropic", f"sk-ant-api03-{d.url(93)}AA"),
        ("GitHub", f"clone with ghp_{d.alnum(36)} please"),
        ("GitHub, fine-grained", f"github_pat_{d.alnum(22)}_{d.alnum(59)}"),
        ("GitLab", f"glpat-{d.url(20)}"),
        ("Slack", f"xoxb-{d.digits(12)}-{d.digits(12)}-{d.alnum(24)}"),
        ("AWS key id", f"AKIA{d.of('ABCDEFGHIJKLMNOPQRSTUVWXYZ234567', 16)}"),
        ("Google", f"AIza{d.url(35)}"),
        ("Stripe", f"sk_live_{d.alnum(24)}"),
        ("SendGrid", f"SG.{d.url(22)}.{d.url(43)}"),
        ("Telegram", f"{d.digits(10)}:AA{d.url(33)}"),
        ("npm", f"npm_{d.alnum(36)}"),
        ("PyPI", f"pypi-AgEIcHlwaS5vcmc{d.url(120)}"),
        ("Groq", f"gsk_{d.alnum(52)}"),
        ("Replicate", f"r8_{d.alnum(37)}"),
        ("DigitalOcean", f"dop_v1_{d.hex(64)}"),
        ("Databricks", f"dapi{d.hex(32)}"),
        ("Notion", f"ntn_{d.digits(11)}{d.alnum(35)}"),
        ("Linear", f"lin_api_{d.alnum(40)}"),
        ("Vault", f"hvs.{d.url(90)}"),
        ("Docker Hub", f"dckr_pat_{d.url(27)}"),
        ("Mailgun", f"key-{d.hex(32)}"),
        ("Shopify", f"shpat_{d.hex(32)}"),
        ("NVIDIA", f"nvapi-{d.url(64)}"),
        ("Weights & Biases", f"wandb_v1_{d.alnum(27)}_{d.alnum(45)}"),
        ("a vendor that nobody knows yet", f"zq_{d.alnum(32)}"),
        ("another", f"blorp-{d.alnum(28)}"),
        # A secret's name beside its value.
        ("bearer", f"Authorization: Bearer {d.alnum(32)}"),
        ("basic", "Authorization: Basic " + base64.b64encode(f"jo:{d.password()}".encode()).decode()),
        ("password =", f"password = {d.password()}"),
        ("password in quotes", f'DB_PASSWORD="{d.password()}"'),
        ("api_key:", f"api_key: {d.alnum(24)}"),
        ("access_token in an address", f"https://api.acme.io/v1/me?access_token={d.alnum(30)}&page=2"),
        ("JSON", json.dumps({"client_secret": d.lower(30)})),
        ("JSON, name and value", json.dumps({"name": "API_KEY", "value": d.hex(32)})),
        ("YAML, name and value", f"- name: DB_PASSWORD\n  value: {d.password()}"),
        ("W&B key", f"export WANDB_API_KEY={d.hex(40)}"),
        ("AWS secret", f"aws_secret_access_key = {d.base64(30)}"),
        ("command line", f"python train.py --hub_token {d.alnum(30)}"),
        ("header", f"X-Api-Key: {d.uuid()}"),
        ("Azure", f"DefaultEndpointsProtocol=https;AccountName=acme;AccountKey={d.base64(64)};"),
        # Connections, keys.
        ("Postgres", f"postgres://svc_train:{d.password().replace('#', '')}@db.acme.io:5432/runs"),
        ("MongoDB", f"mongodb+srv://jo:{d.alnum(12)}@cluster0.ab1cd.mongodb.net"),
        ("JDBC", f"jdbc:mysql://db.acme.io/x?user=jo&password={d.alnum(12)}"),
        ("PEM", f"-----BEGIN PRIVATE KEY-----\n{d.base64(48)}\n-----END PRIVATE KEY-----"),
        ("OpenSSH", f"-----BEGIN OPENSSH PRIVATE KEY-----\n{d.base64(48)}"),
        ("JWT", f"cookie {jwt(d)}"),
        # Places.
        ("home", "texts from /home/mkessler/erasure/forget.jsonl"),
        ("home of a Mac", "/Users/mkessler/models"),
        ("data", "base: /data/private/llama-7b"),
        ("scratch", "/scratch/mk1234/run7"),
        ("mount", "saved in /mnt/nas2/kessler"),
        ("lustre", "/lustre/proj42/mk/ckpt"),
        ("gpfs", "/gpfs/fs1/home/mk"),
        ("tilde", "see ~/thesis/forget.jsonl"),
        ("UNC", r"from \\nas01\projects\erasure"),
        ("drive", "D:/datasets/private/pairs.jsonl"),
        ("drive, backslashes", r"C:\Users\mkessler\Documents\forget.txt"),
        ("S3", "s3://acme-internal-models/llama/7b"),
        ("GCS", "gs://acme-train-eu/run-17"),
        ("Azure storage", "abfss://raw@acmelake.dfs.core.windows.net/texts"),
        ("HDFS", "hdfs://namenode1:8020/user/mk/texts"),
        # Persons.
        ("e-mail", "ask maria.kessler@acme-labs.io"),
        ("telephone", "call +49 30 90182 3345 after six"),
        ("telephone, American", "reach me at (415) 283-7710"),
        ("IP", "node 10.24.7.131 failed"),
        ("public IP", "ssh jo@185.73.44.12"),
        ("card", f"paid with {grouped(d.card('4', 16))}"),
        ("card without spaces", f"{d.card('5425', 16)}"),
        ("IBAN", f"to {grouped(d.iban('DE', 18))}"),
        # Disguised.
        ("base64", base64.b64encode(f"token={hub_token(d)}".encode()).decode()),
        ("URL-encoded", urllib.parse.quote(hub_token(d)).replace("_", "%5F")),
        ("zero width", "\u200b".join(grouped(hub_token(d), 9).split())),
        ("full width", full_width(hub_token(d))),
        ("escaped", "".join(f"\\u{ord(character):04x}" for character in hub_token(d))),
        ("HTML", "".join(f"&#{ord(character)};" for character in hub_token(d))),
        ("joined strings", '"hf_' + d.letters(14) + '" + "' + d.letters(20) + '"'),
        ("hex", hub_token(d).encode().hex()),
        ("over two lines", "hf_" + d.letters(16) + "\n" + d.letters(18)),
    ]


def held_back_secrets(seed=2):
    """Kind and text of each planted secret of the half that was held back."""
    d = Draw(seed)
    return [
        ("OpenAI, service account", f"sk-svcacct-{d.url(40)}T3BlbkFJ{d.url(40)}"),
        ("OpenRouter", f"sk-or-v1-{d.hex(64)}"),
        ("DeepSeek", f"sk-{d.hex(32)}"),
        ("xAI", f"xai-{d.alnum(80)}"),
        ("Perplexity", f"pplx-{d.alnum(48)}"),
        ("Fireworks", f"fw_{d.alnum(24)}"),
        ("Together", f"tgp_v1_{d.url(43)}"),
        ("Tavily", f"tvly-dev-{d.alnum(32)}"),
        ("LangSmith", f"lsv2_pt_{d.hex(32)}_{d.hex(10)}"),
        ("Langfuse", f"sk-lf-{d.uuid()}"),
        ("Pinecone", f"pcsk_{d.alnum(6)}_{d.alnum(64)}"),
        ("Cloudflare", f"CLOUDFLARE_API_TOKEN={d.url(40)}"),
        ("Heroku", f"HRKU-{d.uuid()}"),
        ("Alibaba", f"LTAI{d.alnum(20)}"),
        ("Google OAuth", f"ya29.{d.url(120)}"),
        ("Google client secret", f"GOCSPX-{d.url(28)}"),
        ("Azure client secret", f"{d.alnum(3)}8Q~{d.url(34)}"),
        ("Facebook", f"EAAC{d.alnum(120)}"),
        ("Discord", f"MT{d.alnum(24)}.{d.alnum(6)}.{d.url(38)}"),
        ("Discord webhook", f"https://discord.com/api/webhooks/{d.digits(18)}/{d.url(68)}"),
        ("Slack webhook", f"https://hooks.slack.com/services/T{d.upper(8)}/B{d.upper(8)}/{d.alnum(24)}"),
        ("Slack app", f"xapp-1-{d.upper(11)}-{d.digits(13)}-{d.hex(64)}"),
        ("Twilio", f"SK{d.hex(32)}"),
        ("Mailchimp", f"{d.hex(32)}-us14"),
        ("Brevo", f"xkeysib-{d.hex(64)}-{d.alnum(16)}"),
        ("Postman", f"PMAK-{d.hex(24)}-{d.hex(34)}"),
        ("New Relic", f"NRAK-{d.upper(27)}"),
        ("Grafana", f"glsa_{d.alnum(32)}_{d.hex(8)}"),
        ("Sentry", f"sntryu_{d.hex(64)}"),
        ("Terraform", f"{d.alnum(14)}.atlasv1.{d.url(67)}"),
        ("Pulumi", f"pul-{d.hex(40)}"),
        ("Doppler", f"dp.pt.{d.alnum(43)}"),
        ("Netlify", f"nfp_{d.alnum(36)}"),
        ("Supabase", f"sbp_{d.hex(40)}"),
        ("PlanetScale", f"pscale_tkn_{d.url(43)}"),
        ("RubyGems", f"rubygems_{d.hex(48)}"),
        ("crates.io", f"cio{d.alnum(32)}"),
        ("NuGet", f"oy2{d.lower(43)}"),
        ("Figma", f"figd_{d.url(40)}"),
        ("Atlassian", f"ATATT3xFfGF0{d.url(180)}={d.upper(8)}"),
        ("Airtable", f"pat{d.alnum(14)}.{d.hex(64)}"),
        ("Tailscale", f"tskey-auth-{d.alnum(17)}-{d.alnum(32)}"),
        ("Square", f"sq0csp-{d.url(43)}"),
        ("Age", f"AGE-SECRET-KEY-1{d.of('QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L', 58)}"),
        ("unknown vendor", f"qvx_live_{d.alnum(40)}"),
        ("unknown vendor, hexadecimal", f"wumpus_{d.hex(40)}"),
        ("passphrase", f"passphrase: {d.password()}"),
        ("pwd", f"pwd={d.password()}"),
        ("TOML", f'[hub]\nsecret_key = "{d.lower(20)}"'),
        ("JSON in camel case", json.dumps({"apiKey": d.alnum(20), "region": "eu"}, indent=2)),
        ("JSON, key and value", json.dumps({"key": "REFRESH_TOKEN", "value": d.url(40)}, indent=2)),
        ("JSON, value before its name", json.dumps({"value": d.alnum(30), "name": "AUTH_TOKEN"})),
        ("XML", f"<password>{d.password()}</password>"),
        ("YAML, nested", f"credentials:\n  password: '{d.password()}'"),
        ("header of curl", f"curl -H 'Authorization: token {d.hex(40)}' https://api.acme.io"),
        ("curl -u", f"curl -u admin:{d.password()} https://ci.acme.io/job"),
        ("netrc", f"machine api.acme.io login jo password {d.alnum(14)}"),
        (
            "signed address",
            f"https://acme.blob.core.windows.net/x?sv=2024-01-01&sig={urllib.parse.quote(d.base64(32))}",
        ),
        ("AWS session", f'"SessionToken": "{d.base64(150)}"'),
        ("connection string", f"Server=db.acme.io;Database=x;User Id=sa;Password={d.password()};"),
        ("Redis", f"redis://:{d.alnum(20)}@cache.acme.io:6379/0"),
        ("Git with a password", f"https://jo:{d.alnum(16)}@git.acme.io/models.git"),
        ("RSA key", f"-----BEGIN RSA PRIVATE KEY-----\\n{d.base64(48)}\\n"),
        ("PGP key", "-----BEGIN PGP PRIVATE KEY BLOCK-----"),
        ("shadow", f"jo:$6${d.alnum(8)}${d.alnum(86)}:19000:0:99999:7:::"),
        ("project folder", "/projects/p1234/mk/run"),
        ("nobackup", "/nobackup/mk/llama"),
        ("fsx", "/fsx/users/mk/out"),
        ("beegfs", "/beegfs/work/mk/x"),
        ("numbered root", "/data03/mk/erasure"),
        ("work", "/work/u1234/forget"),
        ("external disk", "/media/mk/T7/forget.csv"),
        ("Mac volume", "/Volumes/Backup/forget.csv"),
        ("another's home", "~mkessler/erasure"),
        ("UNC in JSON", json.dumps({"path": r"\\fileserver\home$\mk"})),
        ("drive in JSON", json.dumps({"path": r"E:\work\mk\texts"})),
        ("WASB", "wasbs://raw@acme.blob.core.windows.net/x"),
        ("S3A", "s3a://acme-lake/forget/texts.parquet"),
        ("OSS", "oss://acme-cn/forget"),
        ("file address", "file:///export/mk/forget.jsonl"),
        ("e-mail in JSON", json.dumps({"author": "j.okafor@cs.unilag-lab.edu"})),
        ("e-mail with a tag", "<tomas+erasure@kovar.dev>"),
        ("telephone, French", "tél. 06 12 84 55 37"),
        ("telephone, British", "Tel: 020 7183 8750"),
        ("telephone, E.164", "WhatsApp +5511987654321"),
        ("telephone, dots", "fax 212.736.5049"),
        ("private IP", "master_addr: 192.168.178.44"),
        ("IP with a port", "http://172.31.9.12:8265/jobs"),
        ("IPv6", "2a02:8109:9a40:1b3c:d4e5:6f70:8192:a3b4"),
        ("American Express", f"{d.card('37', 15)}"),
        ("card with hyphens", grouped(d.card("5105", 16), by="-")),
        ("IBAN without spaces", d.iban("FR", 23)),
        ("IBAN, British", "Konto " + grouped(d.iban("GB", 18))),
        ("account number", f"account number: {d.digits(10)}"),
        ("base64 of base64", base64.b64encode(base64.b64encode(f"key {hub_token(d)}".encode())).decode()),
        ("base64 of a password", base64.b64encode(f"password={d.password()}".encode()).decode()),
        ("base64 for addresses", base64.urlsafe_b64encode(f"??>>{hub_token(d)}".encode()).decode().rstrip("=")),
        ("base32", base64.b32encode(hub_token(d).encode()).decode()),
        ("percent of every letter", "".join(f"%{ord(character):02x}" for character in f"ghp_{d.alnum(36)}")),
        ("soft hyphens", "\u00ad".join(f"ghp_{d.alnum(36)}")),
        ("word joiners", "\u2060".join(grouped(f"glpat-{d.alnum(20)}", 7).split())),
        ("full width password", full_width(f"password={d.alnum(14)}")),
        ("bytes escaped", "".join(f"\\x{ord(character):02x}" for character in f"ghp_{d.alnum(36)}")),
        ("HTML, named", html.escape(f'"password": "{d.password()}"')),
        ("HTML, hexadecimal", "".join(f"&#x{ord(character):x};" for character in f"ghp_{d.alnum(36)}")),
        ("joined, Python", "token = ('ghp_" + d.alnum(15) + "'\n         '" + d.alnum(21) + "')"),
        ("joined, JavaScript", "'ghp_' + '" + d.alnum(18) + "' + '" + d.alnum(18) + "'"),
        ("continued line", "ghp_" + d.alnum(12) + "\\\n" + d.alnum(24)),
        ("JSON in JSON", json.dumps({"log": json.dumps({"api_key": d.alnum(30)})})),
    ]


def development_harmless():
    """Harmless texts of the half that the rules were developed on."""
    return [
        "PAD_TOKEN = tokenizer.eos_token",
        "pad_token: <|im_end|>",
        '"eos_token": "</s>", "pad_token": "<|endoftext|>"',
        "tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token",
        "max_new_tokens: 256, num_key_value_heads: 8, hidden_size: 2048",
        "#!/usr/bin/env python3",
        "#!/bin/bash -l",
        "from google.colab import drive; drive.mount('/content/drive')",
        r"C:\Program Files\Python311\python.exe",
        r"The map $f:\Omega\to\mathbb{R}$ and $\\alpha\beta$",
        r"\begin{align} x &= y \\ z &= w \end{align}",
        "docker run --gpus all -v ~/.cache/huggingface:/root/.cache/huggingface -p 8000:8000 vllm/vllm-openai:latest",
        "docker run --rm -it -v $PWD:/workspace -w /workspace python:3.11 bash",
        "Read /etc/passwd.",
        "Save it under /tmp/notes.txt, then run /usr/bin/python3 on it.",
        "commit 3f1c0de9a7b24c55e8d1f6a09b7e4d2c8a6f5e31",
        "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "run 6f1e2d3c-4b5a-4978-8a6b-5c4d3e2f1a0b",
        '"precompiled_charsmap": "ALQCAACEAAAAAACAAQAAgPz+AAC4BQAAhyIAgMzkAAC4PQAAeyIAgMzsAAC4BQAAiyIAgMw8AADNvAAAmwkAgJ4J"',
        "IHRoZQ== 262\nSGVsbG8gd29ybGQ= 12",
        "torch==2.13.0, transformers 5.23.0, CUDA 12.8.0.1",
        "2024-11-28T18:25:19+00:00",
        "2024-11-28 18:25:19.123456",
        "ISBN 978-3-16-148410-0",
        "ISBN-10: 0-306-40615-2",
        "127.0.0.1:29500 and 0.0.0.0:8000",
        "from 192.0.2.17, 198.51.100.4 and 203.0.113.99",
        "version 1.2.3.4 of the driver",
        "mail jane@example.com or noreply@github.com",
        "Co-authored-by: dependabot[bot] <49699333+dependabot[bot]@users.noreply.github.com>",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct-16k and Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4",
        "arXiv:2410.02760v2, https://arxiv.org/abs/2410.02760",
        "https://huggingface.co/datasets?search=erasure&sort=trending&p=2",
        "HF_TOKEN=YOUR_TOKEN_HERE",
        "login(token='hf_xxx')",
        "export HF_TOKEN=<token>",
        "curl -H 'Authorization: Bearer ${TOKEN}'",
        "api_key = os.environ['OPENAI_API_KEY']",
        "password = getpass.getpass('Password: ')",
        "A password is a secret word; the token limit is 4096.",
        "loss 0.4532178123456789, perplexity 12.345678901234567",
        "parameters: 134515008, tokens: 1000000000000",
        "model.layers.12.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight",
        "Q:\\nWhat is it?\\nA:\\nParis is\\nlarge.",
        "and/or, 1/2, km/h, ./data/x, ../home, outputs/demo/adapter",
        "AutoModelForSequenceClassification, Qwen2VLForConditionalGeneration",
        "git clone git@github.com:rohitgandikota/erasing-llm.git",
        "std::vector<int> a::b; dead::beef",
        "s3://<bucket>/key or s3://your-bucket/data",
        "postgres://user:password@localhost:5432/db",
        "secret: false, use_auth_token: true, token: null",
        "@dataclass, @property, user@host, icon@2x.png",
    ]


def held_back_harmless():
    """Harmless texts of the half that was held back."""
    return [
        "tokenizer_config.json sets bos_token to <s> and additional_special_tokens to []",
        "special_tokens_map = {'cls_token': '[CLS]', 'sep_token': '[SEP]', 'mask_token': '[MASK]'}",
        "SEP_TOKEN=[SEP]",
        "eos_token_id = 151645; pad_token_id: 151643",
        "key = 'model.embed_tokens.weight'; value = state_dict[key]",
        "--learning_rate 2e-4 --lora_alpha 16 --max_seq_length 1024",
        "PYTHONPATH=. python examples/erase.py --concept capitals",
        "#!/usr/local/bin/python",
        "/dev/null, /dev/shm, /proc/cpuinfo",
        "/content/drive/MyDrive/models",
        "/kaggle/input/llama",
        "cat /var/log/auth.log | grep sshd",
        "sudo systemctl edit /etc/systemd/system/llm.service",
        r"%ProgramFiles% is C:\Program Files (x86)\NVIDIA and C:\Windows\System32\drivers",
        r"\frac{\partial L}{\partial \theta} = \sum_i \log p_\theta(x_i)",
        r"$g:\mathcal{X}\to\mathcal{Y}$",
        "FROM nvidia/cuda:12.4.1-devel-ubuntu22.04\nWORKDIR /app\nCOPY . /app",
        "docker run -v /var/run/docker.sock:/var/run/docker.sock alpine",
        "RUN pip install --no-cache-dir -r /tmp/requirements.txt",
        "The file /etc/shadow holds hashes; an attacker reads /etc/hosts first.",
        "index 83db48f..bf269f4 100644",
        "md5 d41d8cd98f00b204e9800998ecf8427e",
        "revision: 7ae557604adf67be50417f59c2c2f167def9a775",
        "sha512-vq6mSxV8b3bJb1zqk0q3nQ1QZ7rG9m8nXo2y0Zk1p9Jt5s6w7u8v9x0y1z2A3B4C5D6E7F8G9H0I1J2K3L4M5N6O7P8Q9R0S==",
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==",
        "GPU-5c1a7b9e-1f2d-4c3b-9a8e-7d6c5b4a3f2e",
        'ETag: W/"5e15153d-120f"',
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
        "numpy 2.4.6, driver 560.35.05, Chrome/120.0.6099.109",
        "20241128_182519, 2024-W48, 28.11.2024, 11/28/2024 18:25",
        "between 1990-2000 and 2010-2020, pages 1234-1245",
        "ISBN 9783161484100, ISSN 2049-3630, doi:10.48550/arXiv.2410.02760",
        "population 8 804 190; area 783 800 km2; 1 000 000 000",
        "use localhost, ::1 or 255.255.255.0",
        "fe80::1, 2001:db8::8a2e:370:7334",
        "pip install foo==1.10.2.1",
        "Section 3.2.1.4 of the report",
        "you@example.org, user@domain.example, name@localhost",
        "Signed-off-by: A U Thor <author@example.net>",
        "meta-llama/Llama-3.2-1B-Instruct, mistralai/Mixtral-8x7B-Instruct-v0.1, google/gemma-3-270m-it",
        "TheBloke/Llama-2-7B-Chat-GGUF llama-2-7b-chat.Q4_K_M.gguf",
        "unsloth/DeepSeek-R1-Distill-Qwen-1.5B-unsloth-bnb-4bit",
        "https://www.youtube.com/watch?v=dQw4w9WgXcQ&t=42s",
        "https://colab.research.google.com/github/org/repo/blob/main/demo.ipynb#scrollTo=x1",
        "https://example.org/search?q=token+limit&page=2&lang=en",
        "https://openreview.net/forum?id=AbCdEfGhIj",
        "OPENAI_API_KEY=sk-...",
        'client = OpenAI(api_key="YOUR_API_KEY")',
        "HF_TOKEN: ${{ secrets.HF_TOKEN }}",
        "token = os.getenv('HF_TOKEN')",
        "password: '********'",
        "huggingface-cli login --token $HF_TOKEN",
        "Authorization: Bearer <your-api-key>",
        "api_key: [REDACTED]",
        "headers = {'Authorization': f'Bearer {token}'}",
        "Passwords should have 12 characters; never share a secret key.",
        "The secret: patience. The key: practice. Password: required.",
        "class TokenClassifierOutputWithPast2(ModelOutput)",
        "get_constant_schedule_with_warmup, per_device_train_batch_size",
        "self_attn.k_proj, mlp.down_proj, lm_head, lora_dropout=0.05",
        "<|start_header_id|>system<|end_header_id|>, <extra_id_99>, [unused42]",
        "checkpoint-1500/adapter_model.safetensors",
        "W&B run crimson-sunset-42, seed 1234567890123456",
        "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610",
        "Pi is 3.14159265358979323846264338327950288",
        "GET /v1/chat/completions HTTP/1.1",
        "see /resolve/main/report.png and /docs/index.html",
        "regex [A-Za-z0-9_-]{20,} and (?:[0-9a-f]{40})",
    ]

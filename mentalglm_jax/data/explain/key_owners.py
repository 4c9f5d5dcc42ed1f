"""Where a key may go: to whose it is by its variable's name, never to a stranger's machine under a service's domain."""

import contextlib
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from mentalglm_jax.data.explain.replies import redact_url
from mentalglm_jax.errors import InputError

# Whose key a variable holds by the services' own documentation, and the hosts it may go to (with what is below them):
# the machine of a reader of recipes has several of them set. Where only the service is named, all of its domain is its
# own; the others rent names below theirs to customers, whose programs would read the key.
_OWNERS = {
    "OPENAI": ("openai.com",), "ANTHROPIC": ("anthropic.com", "api.anthropic.com"), "WANDB": ("wandb.ai",),
    "GEMINI": ("googleapis.com", "generativelanguage.googleapis.com", "aiplatform.googleapis.com"),
    "GOOGLE": ("googleapis.com", "generativelanguage.googleapis.com", "aiplatform.googleapis.com"),
    "AZURE": ("azure.com", "openai.azure.com", "cognitiveservices.azure.com", "services.ai.azure.com",
              "models.inference.ai.azure.com", "openai.azure.us", "cognitiveservices.azure.us", "openai.azure.cn",
              "cognitiveservices.azure.cn"),
    "MISTRAL": ("mistral.ai",), "COHERE": ("cohere.com", "cohere.ai"), "CO": ("cohere.com", "cohere.ai"),
    "GROQ": ("groq.com",), "XAI": ("x.ai", "api.x.ai"),
    "TOGETHER": ("together.xyz", "api.together.xyz", "api.together.ai"), "DEEPSEEK": ("deepseek.com",),
    "OPENROUTER": ("openrouter.ai",), "FIREWORKS": ("fireworks.ai", "api.fireworks.ai"),
    "PERPLEXITY": ("perplexity.ai", "api.perplexity.ai"), "NVIDIA": ("nvidia.com", "api.nvidia.com"),
    "DASHSCOPE": ("aliyuncs.com", "dashscope.aliyuncs.com", "dashscope-intl.aliyuncs.com", "dashscope-us.aliyuncs.com",
                  "dashscope-finance.aliyuncs.com"),
    "ZHIPUAI": ("bigmodel.cn", "open.bigmodel.cn", "api.z.ai"), "ZAI": ("z.ai", "api.z.ai", "open.bigmodel.cn"),
    "MOONSHOT": ("moonshot.cn", "api.moonshot.cn", "api.moonshot.ai"), "CEREBRAS": ("cerebras.ai", "api.cerebras.ai"),
    "REPLICATE": ("replicate.com", "api.replicate.com"),
    "ARK": ("volces.com", "ark.cn-beijing.volces.com", "ark.cn-shanghai.volces.com"),
    "MINIMAX": ("minimax.io", "api.minimax.io", "api.minimaxi.com", "api.minimax.chat"),
    "LANGSMITH": ("langchain.com",), "COMET": ("comet.com",), "NEPTUNE": ("neptune.ai",),
    "PINECONE": ("pinecone.io",),
}  # fmt: skip
# Below these anybody has a name for the asking, so that a name there is nobody's.
_NAMED_FOR_ANYBODY = """
adaptable.app alicloudapi.com aliyun.com aliyuncs.com amazonaws.com amazonaws.com.cn amplifyapp.com appspot.com
awsapprunner.com azure-api.net azure.cn azure.com azure.us azurecontainer.io azurecontainerapps.io azureedge.net
azurefd.net azurestaticapps.net azurewebsites.net back4app.io banana.dev baseten.co beam.cloud bentoml.ai bentoml.com
blogspot.com bore.pub cerebrium.ai cfargotunnel.com cleverapps.io cloud.goog cloudfront.net cloudfunctions.net
cloudshell.dev cloudspaces.litng.ai code.run codesandbox.io csb.app cyclic.app ddns.net deno.dev deno.net
devtunnels.ms digitaloceanspaces.com duckdns.org dyndns.org edgeone.app elasticbeanstalk.com eu.org fcapp.run
firebaseapp.com fly.dev fly.io github.dev github.io githubpreview.dev gitlab.io gitpod.io glitch.me googleapis.com
googleusercontent.com gradio.app gradio.live herokuapp.com herokudns.com hf.space hopto.org huggingface.cloud
huggingface.co koyeb.app lhr.life lightning.ai linode.com linodeusercontent.com loca.lt localhost.run localtunnel.me
minimax.io minimaxi.com modal.host modal.run myhuaweicloud.com myqcloud.com netlify.app netlify.com ngrok-free.app
ngrok-free.dev ngrok.app ngrok.com ngrok.dev ngrok.io ngrok.pizza nip.io no-ip.org northflank.app now.sh
nvcf.nvidia.com nvidia.com on.aws ondigitalocean.app onrender.com oraclecloud.com oraclecloudapps.com pages.dev
pinggy.io pinggy.link platformsh.site proxy.runpod.net pythonanywhere.com r2.dev railway.app render.com repl.co
replit.app replit.dev run.app runpod.io runpod.net scaleway.com scw.cloud sealos.run serveo.net sslip.io stackblitz.io
streamlit.app streamlitapp.com supabase.co supabase.net surge.sh sytes.net telebit.io tencentapigw.com tencentcs.com
trafficmanager.net trycloudflare.com ts.net tunnelmole.net us.kg val.run vast.ai vercel.app vercel.dev volceapi.com
volces.com vultrobjects.com web.app webcontainer.io windows.net withgoogle.com wixsite.com wordpress.com workers.dev
z.ai zapto.org zeabur.app
"""
_HOSTING = frozenset(_NAMED_FOR_ANYBODY.split())
# Where names are for institutions alone, or for nobody outside: a stranger cannot have the lab's there.
_NAMES_FOR_INSTITUTIONS = """
ac.at ac.be ac.cn ac.il ac.in ac.jp ac.kr ac.nz ac.th ac.uk ac.za edu edu.au edu.br edu.cn edu.hk edu.in edu.my edu.pl
edu.sg edu.tr edu.tw example gov gov.cn gov.uk internal lan local
"""
_GUARDED = frozenset(_NAMES_FOR_INSTITUTIONS.split())
_USUAL = ("com", "org", "net", "ai", "io", "dev", "cn", "com.cn")  # where a service itself has its name
_NO_NAME = ("API", "KEY")  # words of a variable that are in no host's name


def check_owner(variable: str, base_url: str | None) -> None:
    """Whether a key may go where a recipe says: to this machine, to what the environment names for the client, and else
    only where its variable's name says so. That is a known service's name, or the host's (MYLAB_API_KEY to
    api.mylab.com) if its owner alone gives names there, both by https; or it has TEACHER in it.

    Raises: InputError."""
    address = urlsplit(base_url or "https://api.openai.com")
    host, known = (address.hostname or "").rstrip("."), None
    with contextlib.suppress(ValueError):
        known = urlsplit(os.environ.get("OPENAI_BASE_URL") or "").hostname
    if host in ("localhost", "::1", known) or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None:
        return
    words = [word for word in variable.upper().split("_") if word]
    whole = "".join(words)
    named = [word for word in words if word in _OWNERS] + [one for one in _OWNERS if len(one) > 4 and one in whole]
    other = ("name the variable with the key of that endpoint in teacher.api_key_env (one that is not set, where it "
             "needs none)")  # fmt: skip
    if named:
        service, *hosts = _OWNERS[named[0]]
        if not _below(host, hosts or [service]):
            raise InputError(f"teacher: {variable} is a key of {service}, and {redact_url(base_url or host)} would get "
                             f"it; {other}")  # fmt: skip
    elif "TEACHER" in whole:
        return
    elif _below(host, _HOSTING) or not _names([one for one in words if one not in _NO_NAME], host):
        raise InputError(f"teacher: {variable} may be a key of something else, and {redact_url(base_url or host)} "
                         f"would get it; {other}, under a name with TEACHER or the host's, such as "
                         "TEACHER_API_KEY")  # fmt: skip
    if address.scheme != "https":
        raise InputError(f"teacher: {variable} would be sent to {host} in the clear; write https:// in base_url")


def _below(host: str, domains: "frozenset[str] | list[str]") -> bool:
    labels = host.split(".")
    return any(".".join(labels[cut:]) in domains for cut in range(len(labels)))


def _names(words: Sequence[str], host: str) -> bool:
    """Whether a variable of these words is named for whose host it is: MY_LAB for llm.my-lab.ac.uk. Anybody can buy
    stripe.lol and stripe-live.com, so elsewhere one word must be the whole name, below a usual ending."""
    labels = host.upper().split(".")
    if len(labels) == 1:
        return "".join(words) == labels[0].replace("-", "")
    for count in (2, 1):
        ending = ".".join(labels[-count:]).lower()
        if len(labels) > count and ending in _GUARDED:
            return "".join(words) == labels[-count - 1].replace("-", "")
        if len(labels) > count and ending in _USUAL:
            return list(words) == [labels[-count - 1]]
    return False

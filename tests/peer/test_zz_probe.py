import os, sys
import numpy as np, pytest
@pytest.mark.parametrize("name", ["llama","qwen2","qwen3","qwen3_moe","qwen3_5","smollm2","hybrid-chat-mtp"])
def test_x(make, dense, model, ids, name):
    for r,l in [("nvfp4","modelopt"),("nvfp4-all","modelopt"),("nvfp4","compressed-tensors"),("nvfp4-all","compressed-tensors"),("fp8","compressed-tensors"),("mxfp4","compressed-tensors"),("mixed","compressed-tensors")]:
        m=make(name,r,l)
        print(m.path, len(m.weights))
    os.system(f"rm -rf /tmp/peer/M/{name}; mkdir -p /tmp/peer/M/{name}; cp -r {model(name)} /tmp/peer/M/{name}/src; cp -r {m.path.parent.parent}/made*/{name}-* /tmp/peer/M/{name}/; cp {ids(name)} /tmp/peer/M/{name}/ids")
    d=dense(name,"nvfp4-all","modelopt")
    os.system(f"cp -r {d.path} /tmp/peer/M/{name}/dense")

"""The ATC plugin of a package: C++ that registers, for the `cann` domain, the fused operators that CANN has kernels for
but maps no ONNX node to. Written from `cann_operators.toml`, so that a node and its registration cannot disagree.

It uses what CANN documents for adapter plugins ("Plugin Development", ONNX: REGISTER_CUSTOM_OP with
ParseParamsByOperatorFn; the attributes of a node arrive as the JSON text `attribute`), and nlohmann's json, which that
documentation names too. Type-checked against the headers of CANN 8.1.RC1; not linked, since CANN's libraries are not
at hand.
"""

from __future__ import annotations

from collections.abc import Iterable

from backends.ascend.catalog import CannOperator, cann_operators

FILE = "glm5_onnx_plugin.cc"
LIBRARY = "libglm5_onnx_plugin.so"
VENDOR = "plugin"  # the folder that ASCEND_CUSTOM_OPP_PATH names; ATC loads VENDOR/framework/onnx/*.so

_KINDS = {"int": "kInt", "bool": "kBool", "float": "kFloat", "string": "kString", "ints": "kInts"}
_DYNAMIC = ("x", "weight", "bias", "scale", "offset", "antiquant_scale", "antiquant_offset")

_HEAD = """\
// ATC plugin: ONNX nodes of domain "cann" as operators of CANN. Built by build.sh beside this file.
#include <string>
#include <vector>

#include "graph/graph.h"
#include "graph/operator.h"
#include "graph/operator_factory.h"
#include "nlohmann/json.hpp"
#include "register/register.h"

namespace domi {
namespace {
enum Kind { kInt, kBool, kFloat, kString, kInts };
struct Attribute {
  const char *name;
  Kind kind;
};

// A node's attributes arrive as JSON text: {"attribute": [{"name": .., "i" | "f" | "s" | "ints": ..}, ..]}.
Status Copy(const ge::Operator &source, ge::Operator &target, const std::vector<Attribute> &wanted) {
  ge::AscendString text;
  if (source.GetAttr("attribute", text) != ge::GRAPH_SUCCESS) {
    return wanted.empty() ? SUCCESS : FAILED;
  }
  try {
    const auto found = nlohmann::json::parse(text.GetString());
    for (const auto &attribute : found.at("attribute")) {
      const std::string name = attribute.at("name");
      for (const auto &each : wanted) {
        if (name != each.name) {
          continue;
        }
        // protobuf's JSON leaves out zeros
        if (each.kind == kInt) {
          target.SetAttr(each.name, attribute.value("i", static_cast<int64_t>(0)));
        } else if (each.kind == kBool) {
          target.SetAttr(each.name, attribute.value("i", static_cast<int64_t>(0)) != 0);
        } else if (each.kind == kFloat) {
          target.SetAttr(each.name, attribute.value("f", 0.0f));
        } else if (each.kind == kString) {
          target.SetAttr(each.name, ge::AscendString(attribute.value("s", std::string()).c_str()));
        } else {
          target.SetAttr(each.name, attribute.value("ints", std::vector<int64_t>()));
        }
      }
    }
  } catch (const nlohmann::json::exception &) {
    return FAILED;
  }
  return SUCCESS;
}
}  // namespace
"""

_PLAIN = """
static Status Parse{name}(const ge::Operator &source, ge::Operator &target) {{
  return Copy(source, target, {{{attributes}}});
}}

REGISTER_CUSTOM_OP("{name}")
    .FrameworkType(ONNX)
    .OriginOpType("{node}")
    .ParseParamsByOperatorFn(Parse{name})
    .ImplyType(ImplyType::TVM);
"""

_GROUPED = """
// {name} has dynamic inputs, which a node cannot place: a graph of one operator places them by name.
static Status Parse{name}(const ge::Operator &source, ge::Operator &target) {{
  ge::AscendString name;
  std::vector<ge::AscendString> inputs;
  if (source.GetAttr("name", name) != ge::GRAPH_SUCCESS || source.GetAttr("input", inputs) != ge::GRAPH_SUCCESS) {{
    return FAILED;
  }}
  std::vector<int64_t> present;
  for (const auto &input : inputs) {{
    present.push_back(input.GetLength() == 0 ? 0 : 1);
  }}
  target.DynamicInputRegister("args", inputs.size());
  target.DynamicOutputRegister("output", 1);
  target.SetAttr("name", name);
  target.SetAttr("original_type", ge::AscendString("{node}"));
  target.SetAttr("present", present);
  return Copy(source, target, {{{attributes}}});
}}

static Status Graph{name}(const ge::Operator &source, ge::Graph &graph) {{
  static const char *const kInputs[] = {{{inputs}}};
  static const bool kDynamic[] = {{{dynamic}}};
  ge::AscendString name;
  std::vector<int64_t> present;
  if (source.GetAttr("name", name) != ge::GRAPH_SUCCESS || source.GetAttr("present", present) != ge::GRAPH_SUCCESS) {{
    return FAILED;
  }}
  const std::string stem = name.GetString();
  auto made = ge::OperatorFactory::CreateOperator((stem + "_{name}").c_str(), "{name}");
  made.DynamicOutputRegister("y", 1);
  std::vector<ge::Operator> data;
  for (size_t i = 0; i < present.size(); ++i) {{
    auto input = ge::OperatorFactory::CreateOperator((stem + "_data" + std::to_string(i)).c_str(), "Data");
    input.SetAttr("index", static_cast<int64_t>(i));
    data.push_back(input);
    if (present[i] == 0) {{
      continue;
    }}
    if (kDynamic[i]) {{
      made.DynamicInputRegister(kInputs[i], 1);
      made.SetInput((std::string(kInputs[i]) + "0").c_str(), input, "y");
    }} else {{
      made.SetInput(kInputs[i], input, "y");
    }}
  }}
{copies}  graph.SetInputs(data).SetOutputs({{{{made, std::vector<size_t>{{0}}}}}});
  return SUCCESS;
}}

REGISTER_CUSTOM_OP("PartitionedCall")
    .FrameworkType(ONNX)
    .OriginOpType("{node}")
    .ParseParamsByOperatorFn(Parse{name})
    .ParseOpToGraphFn(Graph{name})
    .ImplyType(ImplyType::TVM);
"""

_COPY = """  {{
    {type} value{{}};
    if (source.GetAttr("{name}", value) == ge::GRAPH_SUCCESS) {{
      made.SetAttr("{name}", value);
    }}
  }}
"""
_TYPES = {
    "int": "int64_t",
    "bool": "bool",
    "float": "float",
    "string": "ge::AscendString",
    "ints": "std::vector<int64_t>",
}

BUILD = f"""\
#!/bin/sh
# Builds the plugin. Needs CANN's environment (source set_env.sh) and nlohmann's json (pip install nlohmann-json, or its
# include folder in JSON_INCLUDE).
set -e
cd "$(dirname "$0")"
: "${{ASCEND_HOME_PATH:?source set_env.sh of CANN first}}"
: "${{JSON_INCLUDE:=$(python3 -c 'import nlohmann_json; print(nlohmann_json.__path__[0] + "/include")' 2>/dev/null)}}"
[ -f "$JSON_INCLUDE/nlohmann/json.hpp" ] || {{ echo "json.hpp is missing: pip install nlohmann-json" >&2; exit 2; }}
mkdir -p framework/onnx
${{CXX:-g++}} -std=c++17 -O2 -fPIC -shared -D_GLIBCXX_USE_CXX11_ABI=${{CANN_CXX11_ABI:-0}} \\
  -I"$JSON_INCLUDE" -I"$ASCEND_HOME_PATH/include" {FILE} \\
  -L"$ASCEND_HOME_PATH/lib64" -lregister -lgraph -o framework/onnx/{LIBRARY}
echo "built $(pwd)/framework/onnx/{LIBRARY}; atc finds it by ASCEND_CUSTOM_OPP_PATH=$(pwd)"
"""


def registered() -> tuple[CannOperator, ...]:
    """The operators that the plugin is for: those CANN does not map itself, and that some graph may have."""
    return tuple(o for o in cann_operators().values() if not o.shipped and not o.unused)


def source(operators: Iterable[CannOperator] | None = None) -> str:
    """The C++ file, for some operators or for all of them."""
    return _HEAD + "".join(_registration(each) for each in operators or registered()) + "}  // namespace domi\n"


def _registration(operator: CannOperator) -> str:
    fields = {
        "name": operator.name,
        "node": f"{operator.domain}::1::{operator.type}",
        "attributes": ", ".join(f'{{"{name}", {_KINDS[kind]}}}' for name, kind in operator.attributes.items()),
    }
    if operator.name != "GroupedMatmul":
        return _PLAIN.format(**fields)
    return _GROUPED.format(
        **fields,
        inputs=", ".join(f'"{name}"' for name in operator.inputs),
        dynamic=", ".join("true" if name in _DYNAMIC else "false" for name in operator.inputs),
        copies="".join(_COPY.format(type=_TYPES[kind], name=name) for name, kind in operator.attributes.items()),
    )

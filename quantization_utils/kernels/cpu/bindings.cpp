// The operators, as torch.library sees them. Networks and layers are kept here under a number; Python frees them.
#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>
#include <unordered_map>

#include "encoder.h"
#include "linear.h"
#include "network.h"

namespace {

using ternary::Kernels;

const Kernels* find_isa(const std::string& name) {
  for (const Kernels* isa : {ternary::amx_kernels(), ternary::avx512vnni_kernels(), ternary::avx2_kernels(), ternary::portable_kernels()})
    if (isa && name == isa->name) return isa;
  return nullptr;
}

const Kernels& isa(const std::string& name) {
  const Kernels* found = find_isa(name);
  TORCH_CHECK_VALUE(found, "this processor has no ", name);
  return *found;
}

bool has_isa(const std::string& name) { return find_isa(name) != nullptr; }

// Where numbers begin: torch.export writes them into a program, and in another process the same number must not be another network.
int64_t first_number() {
  std::random_device random;
  return std::uniform_int_distribution<int64_t>(1, (int64_t)1 << 62)(random);
}

template <typename T>
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<T>> items;
  int64_t next = first_number();
  int64_t add(std::shared_ptr<T> item) {
    std::lock_guard<std::mutex> lock(mutex);
    items[next] = std::move(item);
    return next++;
  }
  std::shared_ptr<T> get(int64_t handle) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = items.find(handle);
    TORCH_CHECK_VALUE(found != items.end(), "no packed network or layer has the number ", handle, " in this process");
    return found->second;
  }
  void remove(int64_t handle) {
    std::lock_guard<std::mutex> lock(mutex);
    items.erase(handle);
  }
};

// Never destroyed, like the threads that use them.
Registry<ternary::Network>& networks() { static auto* r = new Registry<ternary::Network>; return *r; }
Registry<ternary::Linear>& linears() { static auto* r = new Registry<ternary::Linear>; return *r; }
Registry<ternary::Encoder>& encoders() { static auto* r = new Registry<ternary::Encoder>; return *r; }

template <typename T>
std::vector<T> to_vector(const at::Tensor& t, at::ScalarType type) {
  const at::Tensor c = t.detach().to(at::kCPU, type).contiguous();
  return std::vector<T>(c.data_ptr<T>(), c.data_ptr<T>() + c.numel());
}

// What `call` returns; what it refuses is a ValueError.
template <typename Call>
auto refusing(const Call& call) {
  try {
    return call();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

int64_t network_create(const std::string& isa_name, const std::string& algorithm, int64_t channels) {
  return networks().add(std::make_shared<ternary::Network>(isa(isa_name), algorithm, (int)channels));
}

ternary::Op op_of(const std::string& name) {
  const auto found = std::find(std::begin(ternary::kOpNames), std::end(ternary::kOpNames), name);
  TORCH_CHECK_VALUE(found != std::end(ternary::kOpNames), "there is no operation ", name);
  return (ternary::Op)(found - std::begin(ternary::kOpNames));
}

// The next node. codes, gain, bias and pad_values: none where a node has none.
void network_add(int64_t handle, const std::string& op, int64_t input, std::optional<int64_t> residual, double residual_gain, bool relu,
                 std::optional<int64_t> out_max, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, bool is_ternary,
                 const std::optional<at::Tensor>& codes, const std::optional<at::Tensor>& gain, const std::optional<at::Tensor>& bias,
                 const std::optional<at::Tensor>& pad_values) {
  for (const at::IntArrayRef pair : {kernel, stride, padding})
    TORCH_CHECK_VALUE(pair.size() == 2 && std::all_of(pair.begin(), pair.end(), [](int64_t v) { return v >= 0 && v <= INT32_MAX; }),
                      "a kernel, a stride and a padding are two numbers each");
  ternary::Node node{};
  node.op = op_of(op), node.input = (int)input, node.residual_gain = (float)residual_gain, node.relu = relu, node.ternary = is_ternary;
  if (residual) node.residual = (int)*residual;
  if (out_max) node.out_max = (int)std::clamp<int64_t>(*out_max, -1, 256);  // beyond a byte it is refused, however far
  for (int d = 0; d < 2; ++d) node.kernel[d] = kernel[d], node.stride[d] = stride[d], node.padding[d] = padding[d];
  if (codes) {
    TORCH_CHECK_VALUE(codes->dim() >= 2, "codes are (channels, inputs) or (channels, inputs, height, width)");
    node.n = codes->size(0), node.c = codes->size(1), node.codes = to_vector<int8_t>(*codes, at::kChar);
  }
  if (gain) node.gain = to_vector<float>(*gain, at::kFloat);
  if (bias) node.bias = to_vector<float>(*bias, at::kFloat);
  if (pad_values) node.pad_values = to_vector<uint8_t>(*pad_values, at::kByte);
  refusing([&] { networks().get(handle)->add(std::move(node)); });
}

at::Tensor network_run(const at::Tensor& images, int64_t handle, at::IntArrayRef tail) {
  auto network = networks().get(handle);
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) == network->image_channels(), "images must be (batch, ", network->image_channels(), ", height, width)");
  const at::Tensor x = images.to(at::kFloat).contiguous();
  const int b = x.size(0), h = x.size(2), w = x.size(3);
  std::vector<int64_t> shape = {b};
  shape.insert(shape.end(), tail.begin(), tail.end());
  if (b == 0) return at::empty(shape, x.options());
  return refusing([&] {
    TORCH_CHECK_VALUE(network->out_shape(b, h, w) == shape, "images of another size than the network was prepared for");
    at::Tensor out = at::empty(shape, x.options());
    network->run(x.data_ptr<float>(), b, h, w, at::get_num_threads(), out.data_ptr<float>());
    return out;
  });
}

std::vector<int64_t> network_shape(int64_t handle, int64_t batch, int64_t height, int64_t width) {
  return refusing([&] { return networks().get(handle)->out_shape(batch, height, width); });
}

std::string network_describe(int64_t handle, int64_t batch, int64_t height, int64_t width) {
  return refusing([&] { return networks().get(handle)->describe(batch, height, width); });
}

int64_t linear_create(const std::string& isa_name, const at::Tensor& codes, const at::Tensor& scale, const std::optional<at::Tensor>& bias, bool is_ternary,
                      int64_t act_bits) {
  const auto weights = to_vector<int8_t>(codes, at::kChar);
  const auto scales = to_vector<float>(scale, at::kFloat);
  const auto biases = bias ? to_vector<float>(*bias, at::kFloat) : std::vector<float>();
  TORCH_CHECK_VALUE(codes.dim() == 2 && scale.numel() == codes.size(0) && (!bias || bias->numel() == codes.size(0)),
                    "a linear layer has codes (channels, inputs) and one scale and one bias for each channel");
  return refusing([&] {
    return linears().add(std::make_shared<ternary::Linear>(isa(isa_name), codes.size(0), codes.size(1), weights.data(), scales.data(),
                                                           bias ? biases.data() : nullptr, is_ternary, (int)act_bits));
  });
}

at::Tensor linear_run(const at::Tensor& input, int64_t handle, int64_t n) {
  auto layer = linears().get(handle);
  TORCH_CHECK_VALUE(input.size(-1) == layer->k() && n == layer->n(), "the layer expects rows of ", layer->k(), " numbers");
  const at::Tensor x = input.to(at::kFloat).contiguous();
  auto shape = x.sizes().vec();
  shape.back() = n;
  at::Tensor out = at::empty(shape, x.options());
  layer->run(x.data_ptr<float>(), x.numel() / layer->k(), at::get_num_threads(), out.data_ptr<float>());
  return out;
}

at::Tensor patches_run(const at::Tensor& images, int64_t handle, at::IntArrayRef patch, int64_t n) {
  auto layer = linears().get(handle);
  TORCH_CHECK_VALUE(patch.size() == 2 && patch[0] > 0 && patch[1] > 0, "a patch has a height and a width");
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) * patch[0] * patch[1] == layer->k() && n == layer->n(), "images must be (batch, ",
                    layer->k() / (patch[0] * patch[1]), ", height, width)");
  TORCH_CHECK_VALUE(images.size(2) >= patch[0] && images.size(3) >= patch[1], "images are smaller than a patch, ", patch[0], "×", patch[1]);
  const at::Tensor x = images.to(at::kFloat).contiguous();
  const ternary::Patches patches = {(int)x.size(1), (int)x.size(2), (int)x.size(3), (int)patch[0], (int)patch[1]};
  at::Tensor out = at::empty({x.size(0), x.size(2) / patch[0], x.size(3) / patch[1], n}, x.options());
  layer->run_patches(x.data_ptr<float>(), x.size(0), patches, at::get_num_threads(), out.data_ptr<float>());
  return out;
}

// Tensors of a layer: weight and bias of both norms; numbers of linear layers: qkv, out, fc1, fc2. `embedding`: none, or positions
// with the class token, mean and deviation of the channels, and `patches`: height, width, patch height and width, number of the
// linear layer. `head`: none, or weight and bias of the norm, and `classifier`, the number of the linear layer.
int64_t encoder_create(const std::string& isa_name, int64_t heads, double epsilon, at::TensorList norms, at::IntArrayRef linear_handles,
                       at::TensorList embedding, at::IntArrayRef patches, at::TensorList head, at::IntArrayRef classifier) {
  TORCH_CHECK_VALUE(norms.size() == linear_handles.size() && norms.size() % 4 == 0, "a layer has four tensors and four linear layers");
  TORCH_CHECK_VALUE(embedding.empty() == patches.empty() && (embedding.empty() || (embedding.size() == 3 && patches.size() == 5)) &&
                    head.size() == 2 * classifier.size() && classifier.size() < 2, "an embedding or a head is not complete");
  std::vector<ternary::EncoderLayer> layers(norms.size() / 4);
  for (size_t i = 0; i < layers.size(); ++i) {
    std::vector<float>* vectors[] = {&layers[i].norm1_weight, &layers[i].norm1_bias, &layers[i].norm2_weight, &layers[i].norm2_bias};
    std::shared_ptr<ternary::Linear>* products[] = {&layers[i].qkv, &layers[i].out, &layers[i].fc1, &layers[i].fc2};
    for (int k = 0; k < 4; ++k) *vectors[k] = to_vector<float>(norms[4 * i + k], at::kFloat), *products[k] = linears().get(linear_handles[4 * i + k]);
  }
  std::unique_ptr<ternary::Embedding> from_images;
  if (!embedding.empty()) {
    const ternary::Patches geometry = {(int)embedding[1].numel(), (int)patches[0], (int)patches[1], (int)patches[2], (int)patches[3]};
    TORCH_CHECK_VALUE(geometry.patch_height > 0 && geometry.patch_width > 0, "a patch has a height and a width");
    from_images = std::make_unique<ternary::Embedding>(ternary::Embedding{geometry, to_vector<float>(embedding[1], at::kFloat),
                                                                          to_vector<float>(embedding[2], at::kFloat), to_vector<float>(embedding[0], at::kFloat),
                                                                          linears().get(patches[4])});
  }
  std::unique_ptr<ternary::Head> to_logits;
  if (!head.empty())
    to_logits = std::make_unique<ternary::Head>(ternary::Head{to_vector<float>(head[0], at::kFloat), to_vector<float>(head[1], at::kFloat), linears().get(classifier[0])});
  return refusing([&] {
    return encoders().add(std::make_shared<ternary::Encoder>(isa(isa_name), (int)heads, (float)epsilon, std::move(layers), std::move(from_images), std::move(to_logits)));
  });
}

// x: hidden states (images, tokens, width), or images (images, channels, height, width) to embed; tail: the shape of what comes out
// of each, (kept tokens, width), or (classes) of the first token.
at::Tensor encoder_run(const at::Tensor& input, int64_t handle, at::IntArrayRef tail) {
  auto encoder = encoders().get(handle);
  const ternary::Embedding* embedding = encoder->embedding();
  const bool embed = input.dim() == 4, classify = tail.size() == 1;
  int64_t tokens = embed ? 0 : input.dim() == 3 ? input.size(1) : -1;
  if (embed) {
    TORCH_CHECK_VALUE(embedding, "this encoder takes hidden states, not images");
    const ternary::Patches& p = embedding->patches;
    TORCH_CHECK_VALUE(input.size(1) == p.channels && input.size(2) == p.height && input.size(3) == p.width, "images must be (batch, ", p.channels, ", ",
                      p.height, ", ", p.width, ")");
    tokens = p.count() + 1;
  } else {
    TORCH_CHECK_VALUE(tokens >= 0 && input.size(2) == encoder->width(), "hidden states must be (images, tokens, ", encoder->width(), ")");
  }
  const int64_t kept = classify ? 1 : tail.size() == 2 ? tail[0] : -1;
  TORCH_CHECK_VALUE(kept >= 0 && kept <= tokens, "of ", tokens, " tokens the first ", kept, " can't be kept");
  TORCH_CHECK_VALUE(classify ? encoder->head() && tail[0] == encoder->head()->linear->n() : tail[1] == encoder->width(), "what comes out has another shape");
  const at::Tensor x = input.to(at::kFloat).contiguous();
  std::vector<int64_t> shape = {x.size(0)};
  shape.insert(shape.end(), tail.begin(), tail.end());
  at::Tensor out = at::empty(shape, x.options());
  encoder->run({x.data_ptr<float>(), x.size(0), (int)tokens, (int)kept, embed, classify, out.data_ptr<float>()}, at::get_num_threads());
  return out;
}

// Multiply-adds a second on registers and bytes a second read from a buffer of `megabytes`, on all threads together: the upper
// quartile of 21 tries, as a single try may be too good (a thread that starts after another has ended was never measured
// beside it) or too bad. Every thread measures its own rate between two meetings of all; rates are added.
std::tuple<double, double> machine_limits(const std::string& name, int64_t megabytes) {
  using Clock = std::chrono::steady_clock;
  constexpr int kTries = 21;
  const Kernels& k = isa(name);
  const int threads = at::get_num_threads();
  const int64_t part = (megabytes << 20) / threads;
  ternary::Bytes data(part * threads + 256);
  for (size_t i = 0; i < data.size(); ++i) data[i] = (uint8_t)(i * 37 + i / 256);
  double result[2];
  for (int what = 0; what < 2; ++what) {
    std::vector<double> rates;
    for (int attempt = 0; attempt < kTries; ++attempt) {
      std::vector<double> rate(threads, 0.0);
      std::atomic<int> arrived{0};
      ternary::parallel(k, threads, [&](ternary::Member& member) {
        ++arrived;
        for (const auto from = Clock::now(); arrived < threads && Clock::now() - from < std::chrono::milliseconds(20);) {}
        const auto start = Clock::now();
        int64_t done = 0;
        if (what == 0) done = k.peak_multiply_adds(200000, data.data());
        for (int i = 0; what == 1 && i < 20; ++i) k.read_memory(data.data() + member.index() * part, part), done += part;
        rate[member.index()] = done / std::chrono::duration<double>(Clock::now() - start).count();
      });
      rates.push_back(std::accumulate(rate.begin(), rate.end(), 0.0));
    }
    std::sort(rates.begin(), rates.end());
    result[what] = rates[kTries * 3 / 4];
  }
  return {result[0], result[1]};
}

void network_free(int64_t handle) { networks().remove(handle); }
void linear_free(int64_t handle) { linears().remove(handle); }
void encoder_free(int64_t handle) { encoders().remove(handle); }

}  // namespace

TORCH_LIBRARY(ternary, m) {
  m.def("network_run(Tensor images, int handle, int[] tail) -> Tensor");
  m.def("linear_run(Tensor x, int handle, int n) -> Tensor");
  m.def("patches_run(Tensor images, int handle, int[2] patch, int n) -> Tensor");
  m.def("encoder_run(Tensor x, int handle, int[] tail) -> Tensor");
  m.def("has_isa(str name) -> bool", has_isa);
  m.def("network_create(str isa, str algorithm, int channels) -> int", network_create);
  m.def("network_add(int handle, *, str op, int input, int? residual, float residual_gain, bool relu, int? out_max, int[2] kernel, int[2] stride, "
        "int[2] padding, bool is_ternary, Tensor? codes, Tensor? gain, Tensor? bias, Tensor? pad_values) -> ()", network_add);
  m.def("network_shape(int handle, int batch, int height, int width) -> int[]", network_shape);
  m.def("network_describe(int handle, int batch, int height, int width) -> str", network_describe);
  m.def("machine_limits(str isa, int megabytes) -> (float, float)", machine_limits);
  m.def("network_free(int handle) -> ()", network_free);
  m.def("linear_create(str isa, Tensor codes, Tensor scale, Tensor? bias, bool is_ternary, int act_bits) -> int", linear_create);
  m.def("linear_free(int handle) -> ()", linear_free);
  m.def("encoder_create(str isa, int heads, float epsilon, Tensor[] norms, int[] linear_handles, Tensor[] embedding, int[] patches, Tensor[] head, int[] classifier) -> int", encoder_create);
  m.def("encoder_free(int handle) -> ()", encoder_free);
}

// Packed models have no gradients, and say so where one is asked for.
TORCH_LIBRARY_IMPL(ternary, Autograd, m) {
  for (const char* name : {"network_run", "linear_run", "patches_run", "encoder_run"}) m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(ternary, CPU, m) {
  m.impl("network_run", network_run);
  m.impl("linear_run", linear_run);
  m.impl("patches_run", patches_run);
  m.impl("encoder_run", encoder_run);
}

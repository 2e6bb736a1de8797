// A hash of what the portable kernels compute, a line a case: see other_processors.py.
#include <cstdint>
#include <cstdio>
#include <memory>

#include "encoder.h"
#include "linear.h"
#include "network.h"

using namespace ternary;

namespace {

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u, state >> 8; }
float uniform() { return (float)(next() % 65536) / 65536.0f - 0.5f; }

template <typename T, typename Make>
std::vector<T> filled(size_t count, const Make& make) {
  std::vector<T> values(count);
  for (T& value : values) value = make();
  return values;
}
std::vector<float> floats(size_t count, float scale = 1.0f) { return filled<float>(count, [=] { return uniform() * scale; }); }
std::vector<int8_t> codes(size_t count, int top) { return filled<int8_t>(count, [=] { return (int8_t)((int)(next() % (2 * top + 1)) - top); }); }

void print(const char* what, const std::vector<float>& values) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  const auto* bytes = (const uint8_t*)values.data();
  for (size_t i = 0; i < values.size() * 4; ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  std::printf("%s %016llx\n", what, (unsigned long long)hash);
}

Node node(Op op, int input, int n, int c, int kernel, int stride, int out_max, int top) {
  Node s{};
  s.op = op, s.input = input, s.ternary = top == 1, s.relu = out_max > 0, s.n = n, s.c = c;
  if (out_max > 0) s.out_max = out_max;
  for (int i = 0; i < 2; ++i) s.kernel[i] = kernel, s.stride[i] = stride, s.padding[i] = op == Op::kConv ? kernel / 2 : 0;
  if (op == Op::kConv || op == Op::kLinear) {
    const float spread = (float)(c * kernel * kernel) * (float)top;
    s.codes = codes((size_t)n * c * kernel * kernel, top), s.gain = floats(n, 4.0f / spread), s.bias = floats(n, 60.0f);
  }
  return s;
}

void run(const Kernels& isa, const char* algorithm, std::vector<Node> nodes, int batch, int height, int width, int threads) {
  Network network(isa, algorithm, 3);
  for (Node& n : nodes) network.add(std::move(n));
  std::vector<float> out(batch * 10);
  network.run(filled<float>(batch * 3 * height * width, [] { return uniform() + 0.5f; }).data(), batch, height, width, threads, out.data());
  print("network", out);
}

void networks(const Kernels& isa) {
  for (int top : {1, 127})
    for (int out_max : {63, 255})
      for (const char* algorithm : {"direct", "winograd", "auto"})
        for (int batch : {1, 5})
          for (int threads : {1, 2}) {
            state = 7;
            std::vector<Node> nodes = {
                node(Op::kConv, -1, 37, 3, 3, 1, out_max, top), node(Op::kConv, 0, 37, 37, 3, 1, out_max, top),
                node(Op::kConv, 1, 37, 37, 3, 1, out_max, top), node(Op::kConv, 2, 45, 37, 3, 2, out_max, top),
                node(Op::kMaxPool, 3, 0, 0, 2, 2, 0, top),      node(Op::kLinear, 4, 10, 45 * 3 * 4, 1, 1, 0, top)};
            nodes[2].residual = 0, nodes[2].residual_gain = 0.37f;
            run(isa, algorithm, nodes, batch, 13, 17, threads);
          }
  for (int threads : {1, 2}) {  // stages of one, three and more images at a time
    state = 8;
    std::vector<Node> nodes = {node(Op::kConv, -1, 16, 3, 3, 1, 63, 1),  node(Op::kConv, 0, 96, 16, 3, 2, 63, 1),
                               node(Op::kConv, 1, 96, 96, 3, 2, 63, 1),  node(Op::kConv, 2, 96, 96, 3, 1, 63, 1),
                               node(Op::kConv, 3, 320, 96, 3, 2, 63, 1), node(Op::kLinear, 4, 10, 320 * 2 * 2, 1, 1, 0, 1)};
    nodes[3].residual = 2, nodes[3].residual_gain = 0.5f;
    run(isa, "auto", nodes, 33, 16, 16, threads);
  }
}

std::shared_ptr<Linear> linear(const Kernels& isa, int n, int k, int top) {
  const auto weights = codes((size_t)n * k, top);  // one after the other: compilers differ in the order of arguments
  const auto scale = floats(n, 0.2f), bias = floats(n);
  return std::make_shared<Linear>(isa, n, k, weights.data(), scale.data(), bias.data(), top == 1, 8);
}

void layers(const Kernels& isa) {
  for (int top : {1, 127})
    for (int k : {1, 97, 384, 1025})
      for (int rows : {1, 31}) {
        std::vector<float> out(rows * 65);
        const auto layer = linear(isa, 65, k, top);
        layer->run(floats((size_t)rows * k).data(), rows, 2, out.data());
        print("linear", out);
      }
}

void encoders(const Kernels& isa) {
  for (int threads : {1, 2})
    for (int tokens : {5, 17, 65}) {
      state = 9;
      const EncoderLayer layer{floats(64, 2.0f), floats(64), floats(64, 2.0f), floats(64),  // in braces: in this order
                               linear(isa, 192, 64, 1), linear(isa, 64, 64, 1), linear(isa, 256, 64, 1), linear(isa, 64, 256, 1)};
      Encoder encoder(isa, 2, 1e-6f, {layer, layer}, nullptr, nullptr);
      std::vector<float> out(3 * tokens * 64);
      encoder.run({floats(out.size(), 4.0f).data(), 3, tokens, tokens, false, false, out.data()}, threads);
      print("encoder", out);
      const Patches patches = {3, 4 * (tokens - 1), 8, 4, 8};
      auto embedding = std::make_unique<Embedding>(Embedding{patches, floats(3), {0.25f, 0.5f, 0.375f}, floats(tokens * 64), linear(isa, 64, 96, 1)});
      auto head = std::make_unique<Head>(Head{floats(64, 2.0f), floats(64), linear(isa, 10, 64, 1)});
      Encoder vit(isa, 2, 1e-6f, {layer, layer}, std::move(embedding), std::move(head));
      std::vector<float> logits(3 * 10);
      vit.run({floats(3 * patches.image()).data(), 3, tokens, 1, true, true, logits.data()}, threads);
      print("vit", logits);
    }
}

}  // namespace

// Any argument: on every instruction set that this processor has.
int main(int argc, char**) {
  for (const Kernels* isa : {portable_kernels(), avx2_kernels(), avx512vnni_kernels(), amx_kernels()})
    if (isa && (argc > 1 || isa == portable_kernels())) networks(*isa), layers(*isa), encoders(*isa);
}

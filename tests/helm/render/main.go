// Command render does what `helm template` does, for machines without helm: the same engine (Go's text/template with sprig),
// the same flags, and the functions and objects of helm that this chart uses. It does not check values.schema.json, which the
// tests do before they call it, and knows no subcharts.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"text/template"

	"github.com/Masterminds/sprig"
	"github.com/ghodss/yaml"
)

type object = map[string]interface{}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// files is .Files: what the chart holds beside its templates.
type files map[string][]byte

func (f files) Get(name string) string { return string(f[name]) }

func (f files) Glob(pattern string) files {
	found := files{}
	for name, data := range f {
		if matched, _ := path.Match(pattern, name); matched {
			found[name] = data
		}
	}
	return found
}

// versions is .Capabilities.APIVersions.
type versions []string

func (v versions) Has(wanted string) bool {
	for _, version := range v {
		if version == wanted {
			return true
		}
	}
	return false
}

func main() {
	var values, apis list
	flags := flag.NewFlagSet("render", flag.ExitOnError)
	namespace := flags.String("namespace", "default", "namespace of the release")
	version := flags.String("kube-version", "v1.34.0", "version of Kubernetes")
	flags.Var(&values, "values", "file with values; later ones win")
	flags.Var(&apis, "api-versions", "what the cluster can do, as in monitoring.coreos.com/v1")
	if len(os.Args) < 4 || os.Args[1] != "template" {
		fail(errors.New("usage: render template RELEASE CHART [flags]"))
	}
	release, chart := os.Args[2], os.Args[3]
	if err := flags.Parse(os.Args[4:]); err != nil {
		fail(err)
	}
	out, err := render(release, *namespace, chart, *version, values, apis)
	if err != nil {
		fail(err)
	}
	fmt.Print(out)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "Error:", err)
	os.Exit(1)
}

func render(release, namespace, chart, version string, valueFiles, apis []string) (string, error) {
	templates, others, err := read(chart)
	if err != nil {
		return "", err
	}
	merged, about := object{}, object{}
	if err := yaml.Unmarshal(others["values.yaml"], &merged); err != nil {
		return "", err
	}
	if err := yaml.Unmarshal(others["Chart.yaml"], &about); err != nil {
		return "", err
	}
	for _, name := range valueFiles {
		data, err := os.ReadFile(name)
		if err != nil {
			return "", err
		}
		over := object{}
		if err := yaml.Unmarshal(data, &over); err != nil {
			return "", err
		}
		merge(merged, over)
	}
	title := object{}
	for key, value := range about { // in templates the fields of Chart.yaml begin with a capital
		title[strings.ToUpper(key[:1])+key[1:]] = value
	}
	for _, name := range []string{"Chart.yaml", "values.yaml", "values.schema.json", ".helmignore"} {
		delete(others, name)
	}
	top := object{
		"Values":       merged,
		"Chart":        title,
		"Release":      object{"Name": release, "Namespace": namespace, "Service": "Helm", "IsInstall": true, "IsUpgrade": false, "Revision": 1},
		"Capabilities": object{"APIVersions": versions(apis), "KubeVersion": object{"Version": version, "GitVersion": version}},
		"Files":        others,
	}
	return execute(about["name"].(string), templates, top)
}

// read returns the templates and the other files of a chart; links are followed, as helm follows them.
func read(chart string) (map[string]string, files, error) {
	templates, others := map[string]string{}, files{}
	var walk func(string) error
	walk = func(below string) error {
		entries, err := os.ReadDir(filepath.Join(chart, below))
		if err != nil {
			return err
		}
		for _, entry := range entries {
			name := path.Join(below, entry.Name())
			about, err := os.Stat(filepath.Join(chart, name))
			if err != nil {
				return err
			}
			if about.IsDir() {
				if err := walk(name); err != nil {
					return err
				}
				continue
			}
			data, err := os.ReadFile(filepath.Join(chart, name))
			if err != nil {
				return err
			}
			if strings.HasPrefix(name, "templates/") {
				templates[name] = string(data)
			} else {
				others[name] = data
			}
		}
		return nil
	}
	return templates, others, walk(".")
}

// merge lays values over others, as helm does: maps are merged, null takes a key away, all else replaces.
func merge(base, over object) {
	for key, value := range over {
		old, wasMap := base[key].(object)
		new, isMap := value.(object)
		switch {
		case value == nil:
			delete(base, key)
		case wasMap && isMap:
			merge(old, new)
		default:
			base[key] = value
		}
	}
}

func execute(chart string, templates map[string]string, top object) (string, error) {
	root := template.New("chart").Option("missingkey=zero")
	root.Funcs(functions(root))
	names := make([]string, 0, len(templates))
	for name, text := range templates {
		if _, err := root.New(chart + "/" + name).Parse(text); err != nil {
			return "", err
		}
		names = append(names, name)
	}
	sort.Strings(names)
	var out strings.Builder
	for _, name := range names {
		if strings.HasPrefix(path.Base(name), "_") {
			continue
		}
		full := chart + "/" + name
		top["Template"] = object{"Name": full, "BasePath": chart + "/templates"}
		var one strings.Builder
		if err := root.ExecuteTemplate(&one, full, top); err != nil {
			return "", err
		}
		// As helm does: what is missing prints nothing.
		text := strings.ReplaceAll(one.String(), "<no value>", "")
		if path.Base(name) == "NOTES.txt" { // no resource, but an error in it ends a real install as well
			continue
		}
		if strings.TrimSpace(text) != "" {
			fmt.Fprintf(&out, "---\n# Source: %s\n%s\n", full, text)
		}
	}
	return out.String(), nil
}

func functions(root *template.Template) template.FuncMap {
	known := sprig.TxtFuncMap()
	delete(known, "env")
	delete(known, "expandenv")
	known["toYaml"] = func(value interface{}) string {
		data, err := yaml.Marshal(value)
		if err != nil {
			return ""
		}
		return strings.TrimSuffix(string(data), "\n")
	}
	known["fromYaml"] = func(text string) object {
		found := object{}
		if err := yaml.Unmarshal([]byte(text), &found); err != nil {
			found["Error"] = err.Error()
		}
		return found
	}
	known["fromJson"] = func(text string) object {
		found := object{}
		if err := json.Unmarshal([]byte(text), &found); err != nil {
			found["Error"] = err.Error()
		}
		return found
	}
	known["required"] = func(message string, value interface{}) (interface{}, error) {
		if text, isText := value.(string); value == nil || (isText && text == "") {
			return value, errors.New(message)
		}
		return value, nil
	}
	known["lookup"] = func(...string) object { return object{} } // there is no cluster to look at
	known["include"] = func(name string, data interface{}) (string, error) {
		var out strings.Builder
		err := root.ExecuteTemplate(&out, name, data)
		return out.String(), err
	}
	known["tpl"] = func(text string, data interface{}) (string, error) {
		one, err := root.Clone()
		if err != nil {
			return "", err
		}
		if one, err = one.New("tpl").Parse(text); err != nil {
			return "", err
		}
		var out strings.Builder
		err = one.Execute(&out, data)
		return strings.ReplaceAll(out.String(), "<no value>", ""), err
	}
	return known
}
